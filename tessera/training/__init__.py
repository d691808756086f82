"""One run: from a recipe to a trained model, resumable at any instant."""
