"""Captioners: image -> words -> logits. What a captioner must offer, the two families, their folders."""
