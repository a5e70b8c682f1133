"""Networks: encoders by timm name, projection heads, moving averages, collectives with gradients."""
