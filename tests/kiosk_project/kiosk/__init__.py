"""A project whose release, boot and leaks the tests decide."""
