"""A folder of images: which files it has, which split and class they are of, which of them are sound."""
