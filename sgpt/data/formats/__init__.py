"""Files as people have them, row by row: each bad row is a value with its place, never an exception."""
