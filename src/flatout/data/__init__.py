"""Text that ships with flatout: public-domain passages for calibration, validation and hold-out."""
