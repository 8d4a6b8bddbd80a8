"""`fedlight report`: runs beside each other in one HTML file that needs nothing else."""
