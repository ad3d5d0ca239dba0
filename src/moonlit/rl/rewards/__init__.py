"""What an answer is worth, from the answer and the exact truth alone."""
