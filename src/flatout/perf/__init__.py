"""Time: floors (roofline), measured steps beside them (profile), and steps not yet measured (predict)."""
