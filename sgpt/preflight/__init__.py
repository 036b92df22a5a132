"""What a run will do, take and may suffer from, before its first step."""
