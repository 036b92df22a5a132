"""How the small base `nano` was made."""
