"""SLoRA: what each task learned is cut to directions that the weight has too."""
