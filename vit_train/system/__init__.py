"""What the operating system gives: places as people type them, files that survive, streams, free memory."""
