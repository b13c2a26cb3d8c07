"""CLoRA, and the subspaces that its null space keeps."""
