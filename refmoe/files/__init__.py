"""Read JSON and safetensors files, and replace files whole or not at all."""
