"""Sample text on which new adapters are calibrated; `--text FILE` replaces it.

Written for this purpose: facts with names and numbers, which heads that look far back will look up,
besides steps of reasoning, dialogue, instructions, lists, code and other languages.
"""

SAMPLE_TEXT = """\
Alice Moreno keeps 48 beehives behind the old chapel in Varn.
The ferry to Little Skerry leaves at 6:35 and returns at a quarter past nine.
Let x be the number of red marbles; then the bag holds 3x + 7 marbles in all.
Since 91 equals 7 times 13, it is not a prime number.
Doctor Okafor asked the nurse to give the patient 25 milligrams twice a day.
"I never said that," Bruno answered, and he closed the door without a sound.
To reset the heater, hold the blue button for ten seconds and wait for the beep.
The password of the workshop is tangerine, and only Petra knows it.
def area(width, height): return width * height
Rain fell on the copper roofs all night, and by morning the gutters were singing.
Carlos scored 17 points in the first half and only 4 in the second.
The committee voted to postpone the bridge until the soil has been tested again.
If every worker paints two fences a day, six workers paint thirty-six fences in three days.
Mira's train was delayed, so she missed the violin lesson on Tuesday.
Water boils at a lower temperature on a mountain because the air pressure is lower there.
The red box holds the screws, the green box the nails and the grey box nothing at all.
Wait, that cannot be right: the sum of the angles would be more than 180 degrees.
Harold's phone number ends in 7261, and his sister's ends in 9038.
Cut the onions finely, add a spoon of oil, and let them soften for eight minutes.
La biblioteca cierra a las siete, salvo los viernes.
The museum in Dorrin owns 312 clocks, none of which shows the right time.
Suppose, on the contrary, that the square root of two were a fraction in lowest terms.
Nobody in the village could remember who had planted the walnut tree.
Version 4.2 fixes a crash that happened when a file name contained a comma.
Yusuf bought five notebooks at 1.20 each and paid with a ten.
"How far is it?" she asked, and the driver held up four fingers.
The northern wall is 14 metres long, which is twice the length of the southern one.
Substitute y = 5 into the second equation to obtain x = 12.
A fox crossed the frozen pond, stopped halfway, and looked back at the farm.
The code name of the second expedition was Juniper, and its leader was Ingrid Falk.
SELECT name, price FROM parts WHERE stock < 20 ORDER BY price;
Grandmother's recipe asks for 250 grams of flour and the juice of two lemons.
The orchestra tuned twice, for the oboist had lent her reed to a friend.
Because the function is continuous and changes its sign, it must have a root in between.
Tomas lives at 83 Harbour Street, on the fourth floor, next to a dentist.
The glacier has retreated by nearly two kilometres since the first photographs were taken.
Der Schlüssel liegt unter dem dritten Blumentopf, gleich neben der Treppe.
First check the oil, then the tyres, and only then the lights.
A mouse weighs about 20 grams, so fifty of them weigh one kilogram.
The judge reminded the jury that a rumour is not evidence.
Lena's favourite number is 64, since it is both a square and a cube.
The satellite passes over the station every 97 minutes, always from the west.
Hence the answer is 42, as we found by counting the cases one by one.
Old maps show an island here, though no sailor ever set foot on it.
The bakery on Mill Lane sells out of rye bread before eight o'clock.
He wrote the address on the back of a ticket: Quay 9, warehouse C.
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.
Wanda borrowed 36 books last year and returned all but two of them.
for step in range(10): total += step * step
There were three suspects, but only the gardener had a key to the cellar.
The price rose from 80 to 92, an increase of fifteen percent.
Please send the signed form to Mr. Adeyemi before the end of March.
Her violin was built in 1794, and it still has its first neck.
The probability of two sixes in a row is one in thirty-six.
Sand slowly filled the harbour until only rowing boats could reach the pier.
Kofi's locker is number 55; the combination is left 12, right 30, left 7.
When the bell rang for the second time, the whole class had already gone outside.
Divide both sides by four, and remember that the sign does not change.
Le marchand a vendu onze paniers de pommes avant midi.
The treaty was signed at dawn, in a tent, by two kings who disliked each other.
Ruth's bus is line 28, and it stops in front of the post office.
An hour later the fog lifted and the lighthouse of Cape Ternow came into view.
"""
