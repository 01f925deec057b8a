"""captionfix shows where each word of an image caption comes from."""
