"""The web page where people compare two answers, and what is seen of their comparisons."""
