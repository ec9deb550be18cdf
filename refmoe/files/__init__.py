"""Files as refmoe reads and writes them: JSON, safetensors, and files that are replaced whole or not at all."""
