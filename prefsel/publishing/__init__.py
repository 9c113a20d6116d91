"""What consumers read: versions of a selection's dataset, and of a model trained on it, behind one pointer.

published/<name>/v0001/, v0002/, …   complete Hugging Face folders, never changed once they are sealed
published/<name>/current.json        which of them is current and which were, changed by compare-and-swap
"""
