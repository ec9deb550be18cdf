"""Models larger than memory: layer by layer, block by block, over processes, and resumed where a run was stopped."""
