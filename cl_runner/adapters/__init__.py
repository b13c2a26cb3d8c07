"""What trains, and what of the past answers beside it; the only folder that imports peft.

``kind.py`` says what an adapter kind is; importing the package imports no torch.
"""
