"""Zero-vision SFT data: questions about pictures solved by code that really ran, in text alone."""
