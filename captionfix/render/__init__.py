"""Pictures of explanations. Needs results alone: no torch, no captioner."""
