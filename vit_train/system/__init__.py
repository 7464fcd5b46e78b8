"""What the machine gives: places as people type them, files that survive, streams, memory, precision."""
