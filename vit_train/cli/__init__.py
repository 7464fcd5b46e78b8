"""One small module per command: parse, build, call, print."""
