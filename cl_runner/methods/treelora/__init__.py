"""TreeLoRA, and how a layer chooses the past task that it goes along with."""
