"""The contrastive objectives (arXiv 2401.08491 and ours) and the stage that trains with them."""
