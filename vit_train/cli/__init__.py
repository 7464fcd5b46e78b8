"""One small module per command: parse, build, call, print."""

from vit_train.system import streams

streams.stand()  # before anything else is opened
