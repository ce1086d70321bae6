"""How well explanations tell where their features are active: what is asked, who answers, and what it comes to."""
