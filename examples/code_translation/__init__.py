"""Java to C# between three parties that show each other no code."""
