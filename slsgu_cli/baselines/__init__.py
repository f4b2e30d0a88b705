"""The methods that the paper's Table 1 compares with: FT, GA, GAFT, SalUn and SSD."""
