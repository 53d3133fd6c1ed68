"""Files of text, wherever fsspec finds them, as documents; what cannot be read is named and left out."""
