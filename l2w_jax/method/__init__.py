"""The paper: losses, weights, allocation, and the three updates of a step."""
