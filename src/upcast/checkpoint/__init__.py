"""Files: mapped and read, converted tensor by tensor, written in place, and safe from being overwritten."""
