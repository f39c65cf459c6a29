"""What is done where the cache does not have a piece; imported only then."""
