"""How the embedded model was pretrained."""
