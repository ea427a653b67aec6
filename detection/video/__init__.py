"""Pictures and videos from their source to the annotated file."""
