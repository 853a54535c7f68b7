"""What a checkpoint says of spectra: labels, surveys, spectra, neighbours, and why."""
