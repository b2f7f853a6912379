"""What works through many images: folders, journals, results, evaluation."""
