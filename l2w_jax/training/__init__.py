"""The loop and the step, the state they change, and what they write."""
