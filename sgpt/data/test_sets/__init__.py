"""Test sets by name, downloaded where they are not there."""
