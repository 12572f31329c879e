// Texts to begin with: name, text, question.
export const examples = [
  [
    "A letter",
    "The letter that Ada Lovelace wrote to Charles Babbage in 1843 is lost. It was about the notes to her translation " +
      "of Menabrea's article, which are three times as long as the article itself. Babbage had built a part of the " +
      "Difference Engine by then; the Analytical Engine, which she describes, was never built in their lifetime.",
    "Who wrote the letter?",
  ],
  [
    "A river",
    "The Danube is the second-longest river in Europe, after the Volga. It rises in the Black Forest of Germany, where " +
      "the Brigach and the Breg meet at Donaueschingen, and flows south-east for 2,850 km before it empties into the " +
      "Black Sea. It passes through ten countries, more than any other river of the world. Four of their capitals " +
      "stand on its banks: Vienna, Bratislava, Budapest and Belgrade. Its basin, of 817,000 square kilometres, " +
      "extends into nine more countries. Since the days of Rome it has been a border and a road alike: the canal " +
      "between the Main and the Danube, which was finished in 1992, lets ships go from Rotterdam to Sulina.",
    "Where does the Danube begin?",
  ],
  [
    "Manual of a kettle",
    "Fill the kettle with cold water up to the mark MAX, and never below the mark MIN. Put it on its base and press the " +
      "switch: a blue light shows that it heats. It turns itself off 30 seconds after the water boils, or at once when " +
      "it is lifted. If it was turned on without water, the protection against boiling dry turns it off; let it cool for " +
      "ten minutes before you fill it again. Remove lime every three months: boil half a litre of water with two " +
      "spoons of citric acid, leave it for an hour, and rinse twice. The kettle is guaranteed for two years from the " +
      "day of purchase, except for damage by lime.",
    "How long must it cool after boiling dry?",
  ],
  ["A text of your own", "", ""],
];
