"""Training: one straight line from text to a portable model. Run it with `python -m grist_train --config FILE`."""
