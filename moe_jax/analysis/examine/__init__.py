"""What the routers of a trained model do with a text, layer by layer: `experiments/examine.py`."""
