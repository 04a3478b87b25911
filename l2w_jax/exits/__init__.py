"""Where samples leave: policy, targets, and a runtime that really stops."""
