"""HTTP around inference and ocr. May import both and all that they may."""
