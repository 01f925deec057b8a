"""Captioners: image -> words -> logits. The project's two model families, their folders, and what a captioner must offer."""
