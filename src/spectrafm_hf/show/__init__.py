"""Pictures, and the page in the browser."""
