"""OLieRA, its terms and its penalty."""
