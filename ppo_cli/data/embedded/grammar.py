"""A generative grammar that writes short English film reviews.

The embedded world needs text that belongs to nobody, comes in any amount and has a known
sentiment. Every review here starts on neutral ground (who watched what, when and where) and then
turns positive or negative, so that a short prefix of it leaves the sentiment open.

How the rules read: ``key: option | option ~3`` (``~3`` triples an option's weight). In an option,
``{key}`` expands a rule, ``{key*}`` its ``key+`` or ``key-`` variant by the polarity in force, and
``{key!}`` the variant of the opposite polarity.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import accumulate

KINDS = ("plain", "negation", "contrast")
_KIND_WEIGHTS = (50, 28, 22)
_ENDS = ".!?"


@dataclass(frozen=True)
class Review:
    """One review: its text, 1 for positive or 0 for negative, and how it says so."""

    text: str
    label: int
    kind: str


_NEUTRAL = """
movie: movie ~4 | film ~4 | picture
genre: thriller ~2 | comedy ~3 | drama ~3 | western ~2 | musical | romance
    | horror film ~2 | mystery | war film | crime drama | road movie | adventure | heist film
    | courtroom drama | ghost story | spy film | family film | sequel | remake | fantasy film
    | black comedy | detective story | period drama | disaster movie | science fiction film
    | sports drama | romantic comedy ~2 | monster movie | prison drama
genres: thrillers | comedies | dramas | westerns | musicals | horror films
    | war films | road movies | ghost stories | spy films | period dramas | mysteries
    | love stories | crime stories | science fiction films
sort: small ~2 | low-budget | two-hour | ninety-minute | independent | black-and-white | recent
    | French | Italian | Spanish | Korean | Japanese | British | Irish | Canadian | Mexican
    | Swedish | Danish | Australian | Indian | Polish | German | subtitled
    | big-budget | modern | old | short | new ~2
film: this {movie} ~4 | this {genre} ~4 | this {sort} {genre} ~4 | this {sort} {movie}
    | the new {genre} | a {sort} {genre}
thisfilm: this {movie} ~4 | this {genre} ~4 | this {sort} {genre} ~3 | this {sort} {movie}
who: my sister | my brother | my wife | my husband | my parents | my mother | my father
    | a friend from work | two friends | my kids | my grandmother | my roommate | my neighbor
    | my cousin | my students | my son | my daughter | some colleagues | an old friend
    | a few friends | my aunt | my uncle | my boss | the whole family | my girlfriend
    | my boyfriend | my nephew | my grandfather | my teenage niece
pair: My friends and I ~6 | My sister and I | My brother and I | My wife and I | My husband and I
    | My parents and I | My kids and I | My roommate and I | My cousin and I | My daughter and I
    | My son and I | My mother and I | A friend and I | My neighbor and I | Some colleagues and I
when: last night ~2 | last weekend ~2 | yesterday ~2 | on Sunday | on Friday night | last week
    | over the holidays | on a rainy afternoon | on Saturday | last month | after dinner
    | two days ago | on my birthday | on Tuesday evening | during the summer | in January
    | in October | one evening in March | a week ago | on New Year's Eve | this afternoon
where: at home | at the cinema ~2 | at a festival | on the plane | on television ~2
    | at the local theater | in a packed theater | on my laptop | in an empty theater
    | at a midnight screening | on the train to work | at a friend's house | at our film club
    | at a drive-in | on an old tape | on the big screen ~2 | at the university | in Berlin
    | in a hotel room | at an outdoor screening | in the original language | at a preview
    | on a long flight | at the public library
after: a long week at work | a day at the beach | a long drive | a late dinner | an early shift
    | the kids had gone to bed | reading an article about it | hearing about it on the radio
    | seeing the trailer | cleaning the kitchen | an evening class | a walk in the park
    | finishing the book | a phone call with my sister | the football game
because: a colleague mentioned it | the poster caught my eye | I had read the book
    | my sister works in film | it was raining | I knew the lead actor from television
    | I grew up near that town | the library had a copy | I was writing a paper about it
    | my brother had a spare ticket | it was filmed in my hometown | my neighbor was an extra in it
    | the bus was late | our teacher asked us to | I collect films from that decade
    | a magazine had an interview with the director
month: January | February | March | April | May | June | July | August | September | October
    | November | December
place: Iceland | Prague | New Zealand | Morocco | Chicago | Montreal | Lisbon | Scotland
    | Argentina | Naples | Texas | Vienna | Tokyo | Norway | Hong Kong | Greece | Cuba | Dublin
    | Mumbai | Alaska | Kenya | Brazil | the Alps | the desert | an old factory | a real hospital
    | Warsaw | Seattle | Bulgaria
span: over six weeks | in the summer of that year | in three weeks | over two winters
    | in only ten days | last year | by a crew of twelve | in black and white | at night
    | with a single camera | on location | by a team from Belgium
setting: in a fishing village | in a small town | on a submarine | in a boarding school
    | on a farm in Ireland | in a mountain hotel | in a quiet suburb | on a cargo ship
    | in an office building | in a hospital | in a desert town | on a remote island
    | in a mining town | at an airport | in a Paris apartment | in a traveling circus
    | on a space station | in a military camp | in a harbor city | in a lighthouse
    | in an abandoned theater | in a law firm | at a summer camp | on a train
    | in a tiny restaurant | in the mountains of Peru | in a New York newsroom
era: during the war ~2 | in the seventies | in the near future | in the fifties
    | at the turn of the century | over one long weekend | over the course of a single day
    | in the middle of winter | in the eighties | during an election | in the sixties
    | one week before Christmas | after the flood | during a heat wave | in the last century
role: a young nurse | a retired detective | a taxi driver | a school teacher | a small-town lawyer
    | a jazz singer | a ship captain | a pastry chef | a piano tuner | a night guard
    | a war reporter | a widowed farmer | a chess player | a former boxer | a train conductor
    | a young painter | a country doctor | an office clerk | an aging actor | an astronaut
    | a bank clerk | a librarian | a street musician | a traveling salesman | a police officer
    | a shy student | a truck driver | a lonely baker | a ballet dancer | an insurance agent
    | a puppet maker | a young priest | a radio host | an immigrant tailor | a postman
does: returns to the village | takes a job at a remote hotel | inherits an old house
    | travels across the country by bus | finds a box of letters | plans to rob a bank
    | learns to sail | joins the circus | moves to Paris | teaches music to prisoners
    | wakes up without a memory | searches for a missing brother | drives across the desert
    | keeps bees on an island | hides a secret from the town | opens a restaurant
    | runs for mayor | builds a boat | adopts a stray dog | takes the night shift
    | plays chess for money | investigates a robbery | befriends a robot | enters a dance contest
    | fakes a kidnapping | meets a stranger on a train | hides in a monastery | buys a racehorse
    | witnesses a crime | moves in with three strangers | crosses the border on foot
    | goes looking for a lost painting | starts a band | falls for a rival | raises a wolf
    | wins the lottery | writes letters to a dead poet | solves a murder | flees to the city
group: two sisters | three thieves | four old friends | a group of soldiers | two rival chefs
    | a family of farmers | five students | two brothers | a pair of reporters | twin brothers
    | a team of climbers | six strangers | two cousins from Ohio | a couple of sailors
    | three generations of women | a band of musicians | two detectives
gdo: run a hotel by the sea | rob a museum | are stuck in an elevator | inherit a farm
    | cross the ocean in a small boat | share an apartment | search for a lost treasure
    | meet again after twenty years | open a bakery | hide from the army | go on a road trip
    | solve a murder on a train | spend a night in a castle | start a newspaper
    | fight over a house | plan one last job | get lost in the forest | hunt for a meteor
tale: {role} who {does} ~5 | {group} who {gdo} ~2
based: a true story ~2 | a short story | a stage play | a bestselling novel | a comic book
    | an old folk tale | a series of newspaper articles | a radio play | a court case
    | the diary of {role} | a novel from the thirties | a television series | a video game
start: a car chase | a funeral | a wedding | a storm at sea | a phone call | a birthday party
    | a bank robbery | a train arriving at night | a long shot of a river | a game of cards
    | a voice on the radio | a dinner party | a letter from abroad | a power cut | a baptism
bio: a former dancer | a former journalist | whose last film was a musical
    | who grew up in Argentina | working in English for the first time | who also wrote the script
    | who also plays a small part | who used to teach history | a former stage actor
    | who comes from television | now in her seventies | a student of mine years ago
    | who made his first film at twenty | better known as a painter | who once drove a taxi
runtime: about two hours | just under ninety minutes | nearly three hours
    | two hours and ten minutes
    | exactly a hundred minutes | a little over an hour
fact: it runs for {runtime} ~3 | I saw the version with subtitles
    | there was a scene after the credits
    | the cast includes {job} from {country} ~2 | the soundtrack was recorded in {place} ~2
    | the director is {job} from {country} ~2 | the dialogue is partly in {language}
    | it came out in {month} | it was released in {month} | the tickets were twelve dollars
    | the lead actor also plays the {relative} | the story is told in three parts
    | half of it is in {language} | there was a talk with the director afterwards
    | the theater was half full | it was the first film by this director
plotfact: the story covers {years} in the life of {role} | it was shot in {place} {span} ~2
    | the script is based on {based} ~2 | most of it takes place {setting}
    | the story takes place {setting} {era} ~2 | it opens with {start} ~2 | it ends with {start}
    | the main character is {role} ~2 | it is about {tale} ~3 | there are only four characters in it
seenfact: I saw it {where} ~2 | I watched it {when} | I watched it {where} {when}
    | I saw it with {who} {when}
years: ten years | one summer | forty years | a single night | three decades | one week
job: a former dancer | a stage actor | a young actor | a famous singer | an unknown actor
    | a radio comedian | an opera singer | a retired athlete
country: Spain | Brazil | Poland | Korea | Denmark | Ireland | Canada | India | Egypt | Chile
    | Turkey | Finland
language: French | German | Spanish | Japanese | Italian | Arabic | Portuguese | Russian | Greek
relative: father | twin brother | mother | grandfather | neighbor | narrator | older sister
leadi: I watched {film} with {who} {when} ~6 | I watched {film} {where} {when} ~4
    | I saw {film} with {who} {where} ~3 | I saw {film} {where} {when} ~3
    | I rented {film} because {because} ~2 | I went to see {film} with {who} {when} ~3
    | I finally watched {film} {where} ~2 | I put on {film} after {after} ~2
    | After {after}, I sat down to watch {film} ~2 | I picked {film} because {because} ~2
    | I took {who} to see {film} {when} ~2 | I came across {film} {where} {when}
    | I read the book first and then watched {film} {where} | I caught {film} {where} {when}
    | {When}, I went to see {film} with {who} ~2 | I borrowed {film} from {who} {when}
leadwe: {pair} watched {film} {when} ~4 | {pair} watched {film} {where} ~3
    | {pair} saw {film} {where} {when} ~3 | {pair} went to see {film} {when} ~3
    | We watched {film} {where} {when} | We went to see {film} with {who} {when}
    | Our film club picked {film} for {month} | {pair} rented {film} because {because}
leadfilm: This {movie} about {tale} ~5 | This {genre} about {tale} ~3
    | This {sort} {genre} about {tale} ~3 | Set {setting} {era}, {thisfilm} ~4
    | Based on {based}, {thisfilm} ~3 | This {movie}, shot in {place} {span}, ~2
    | This {genre}, which is set {setting}, ~2 | This {movie}, which is based on {based}, ~2
    | This {movie}, which opens with {start}, | Made in {place} {span}, {thisfilm}
leadfact: This {movie} was shot in {place} {span} ~3 | This {movie} is set {setting} {era} ~3
    | This {movie} is about {tale} ~4 | This {movie} tells the story of {tale} ~3
    | This {genre} follows {tale} ~3 | This {movie} follows {tale} ~2
    | This {movie} is based on {based} ~2 | This {sort} {genre} is about {tale} ~2
    | This {movie} opens with {start} {setting} | This {movie} takes place {setting} {era} ~2
leadin: In this {movie}, {role} {does} ~2 | In this {genre}, {role} {does} ~2
    | In this {genre}, {group} {gdo} ~2 | In this {sort} {genre}, {role} {does}
leadlead: The lead actor, who plays {role}, ~3 | The lead actor in {thisfilm} ~2
    | The young actor who plays {role} in {thisfilm} | The actress who plays {role} ~2
    | The man who plays {role} in {thisfilm} | The main actress in {thisfilm}
leaddir: The director of {thisfilm}, {bio}, ~3 | The director, {bio},
it: it ~5 | the {movie} ~2 | the whole thing ~2 | the whole {movie}
intg: very ~4 | really ~4 | so ~2 | extremely | incredibly | quite | remarkably | rather
intx: absolutely ~3 | simply ~3 | truly ~3 | just ~3 | really ~2 | nothing short of
versus: the original | the first film | the book | anything else I saw this year
    | most {genres} | the director's last film | the stage version | the trailer | the sequel
    | the other {genres} in the festival | what I saw last week
"""

_SENTIMENT = """
adjx+: wonderful ~4 | great ~4 | excellent ~4 | superb ~2 | terrific | fantastic ~2 | brilliant ~2
    | marvelous | delightful ~2 | stunning | magnificent | outstanding | splendid | perfect
    | amazing ~2 | unforgettable | first-rate | fabulous | lovely | beautiful ~2
adjx-: terrible ~4 | awful ~4 | dreadful ~2 | horrible ~2 | unwatchable | atrocious | abysmal
    | appalling | pathetic | ridiculous | unbearable | dire | miserable | hopeless | lousy
    | pointless | lifeless | worthless
adjg+: funny ~3 | clever ~2 | moving ~2 | touching | charming ~2 | gripping ~2 | engaging | witty
    | warm | sweet | smart | exciting | enjoyable ~2 | entertaining ~2 | absorbing | thrilling
    | good ~2 | impressive | refreshing | original | captivating | powerful | heartwarming
    | memorable | rewarding | satisfying | fun | tender
adjg-: boring ~5 | dull ~3 | tedious ~2 | bland | predictable ~2 | annoying | disappointing ~2
    | forgettable | clumsy | shallow | lazy | silly | tiresome | bad ~3 | messy | flat | stale
    | confusing ~2 | weak | poor | hollow | irritating | embarrassing | amateurish | dreary
    | stupid | slow | sloppy | unfunny | depressing
adj+: {adjx+} | {adjg+}
adj-: {adjx-} | {adjg-}
adjp+: {adjx+} ~3 | {intx} {adjx+} ~2 | {adjg+} ~2 | {intg} {adjg+} ~2
    | {adjg+} and {adjg+} ~2 | surprisingly {adjg+} | wonderfully {adjg+} | {adjx+} in every way
    | beautifully made | brilliantly acted | both {adjg+} and {adjg+}
adjp-: {adjx-} ~3 | {intx} {adjx-} ~2 | {adjg-} ~2 | {intg} {adjg-} ~2
    | {adjg-} and {adjg-} ~2 | painfully {adjg-} | unbearably {adjg-} | {adjx-} in every way
    | badly made | terribly acted | both {adjg-} and {adjg-}
qx+: wonderful ~3 | great ~3 | excellent ~3 | superb ~2 | terrific | fantastic | brilliant ~2
    | marvelous | delightful | stunning | magnificent | outstanding | splendid | perfect | amazing
    | first-rate | fabulous | lovely | beautiful
qx-: terrible ~4 | awful ~4 | dreadful ~2 | horrible ~2 | atrocious | abysmal | appalling | pathetic
    | ridiculous | unbearable | dire | hopeless | lousy
qg+: good ~3 | impressive ~2 | refreshing | original | memorable | charming | enjoyable | engaging
    | inventive | strong
qg-: bad ~3 | weak ~2 | poor ~2 | dull ~2 | boring ~2 | disappointing ~2 | forgettable | annoying
    | clumsy | bland | irritating | embarrassing | amateurish | sloppy | lazy
qadj+: {qx+} | {qg+}
qadj-: {qx-} | {qg-}
q+: {qx+} ~4 | {intx} {qx+} ~3 | {qg+} ~2 | {intg} {qg+} ~3 | surprisingly {qg+}
q-: {qx-} ~4 | {intx} {qx-} ~3 | {qg-} ~2 | {intg} {qg-} ~3 | painfully {qg-}
rg+: funny ~2 | charming ~2 | engaging | convincing ~2 | moving | touching | captivating | likable
    | impressive | good ~2
rg-: boring ~2 | dull ~2 | annoying ~2 | bland | irritating | wooden ~2 | weak | bad ~2 | lifeless
    | stiff
r+: {qx+} ~2 | {intx} {qx+} | {rg+} ~2 | {intg} {rg+} ~2 | {rg+} and {rg+} | surprisingly {rg+}
r-: {qx-} ~2 | {intx} {qx-} | {rg-} ~2 | {intg} {rg-} ~2 | {rg-} and {rg-} | painfully {rg-}
np+: a joy to watch ~2 | a real treat ~2 | a small masterpiece | a triumph | a delight ~2
    | one of the best films of the year ~2 | a gem | time well spent | a real pleasure
    | worth every penny | worth every minute | pure magic | a breath of fresh air
    | an instant classic | a work of art | a great way to spend an evening | a huge success
    | the best {movie} I have seen in years ~2 | a {adj+} piece of work | a {adj+} {movie} ~3
    | a winner | everything a {movie} should be | a masterpiece
np-: a complete waste of time ~4 | a total mess ~2 | a bore | a disaster ~2 | a chore to sit through
    | one of the worst films of the year ~2 | an insult to the audience | a huge letdown
    | a waste of money ~2 | a train wreck | painful to sit through | a failure on every level
    | two hours wasted | torture | a big disappointment | a terrible way to spend an evening
    | the worst {movie} I have seen in years ~2 | a {adj-} piece of work | a {adj-} {movie} ~3
    | a waste of talent | everything a {movie} should avoid | garbage
pred+: {adjp+} ~3 | {np+} ~2
pred-: {adjp-} ~3 | {np-} ~2
act+: won me over within minutes | kept me smiling from start to finish | made me laugh and cry
    | made me laugh out loud | deserves every award | left me with a big smile
    | had me on the edge of my seat | hits all the right notes | moved me to tears
    | exceeded all my hopes | gets everything right | works on every level | stays with you for days
    | grabs you from the first scene | made my week | flies by | is full of heart
    | is full of warmth and wit | has real charm | has a {qadj+} ending
    | gets better with every scene
    | has {qadj+} characters and a {qadj+} script | is great fun
act-: bored me to tears ~2 | put me to sleep ~2 | made me want to leave
    | wasted two hours of my life ~2
    | left me cold | made me look at my watch every five minutes | insults its audience
    | tested my patience | ruined my evening | gets everything wrong | fails on every level
    | drags on and on ~2 | goes nowhere | falls apart after half an hour | gave me a headache
    | collapses under its own weight | feels like a bad school play | is full of tired jokes
    | is full of cheap tricks | is a mess from start to finish | has a {qadj-} ending
    | gets worse with every scene | has {qadj-} characters and a {qadj-} script | is no fun
nact+: never drags | is not {adjg-} | was not {adjg-} ~2 | was not {adjx-} at all
    | does not waste a single scene | never puts a foot wrong
    | does not have a weak scene | did not disappoint me | never loses its way
    | does not contain one false note | never talks down to its audience | has no dull moments
    | does not have a single boring minute | does not fail to charm | did not bore me for a second
    | is never {adjg-} ~3 | is not {adjg-} at all ~2 | is anything but {adjg-} ~3
    | is far from {adjg-}
    | is not the least bit {adjg-} | is not to be missed | is never less than {adjx+}
    | could not be better | is not a waste of time at all
nact-: never comes alive | is not {adjg+} | was not {adjg+} ~2 | was not {adjx+} at all
    | makes no sense | does not work | never gets going | does not make any sense | has no heart
    | has no idea what it wants to be | does not deserve your time | never earns its tears
    | did not make me laugh once | does not hold together | has nothing to say
    | could not hold my attention | was not worth the wait | is hardly worth the ticket ~2
    | is not worth your time ~2 | is never {adjg+} ~3 | is not {adjg+} at all ~2
    | is anything but {adjg+} ~3 | is far from {adjg+} | is not the least bit {adjg+}
    | could not be worse | has no charm | is not a {adj+} {movie} | is hardly {adjg+}
vp+: is {pred+} ~4 | was {pred+} ~3 | {act+} ~4
vp-: is {pred-} ~4 | was {pred-} ~3 | {act-} ~4
me+: loved every minute of it ~4 | loved it ~4 | liked it a lot ~2
    | liked it very much | really liked it | enjoyed it from start to finish ~2
    | enjoyed every scene | was hooked from the first scene | laughed from start to finish
    | fell in love with it | adored it | left with a big smile | was moved to tears
    | had a {adjx+} time ~2 | was completely won over | came out smiling | was glued to the screen
    | cheered at the end | was impressed by every scene | really enjoyed it ~2
    | loved the {aspect} ~2 | was delighted | laughed out loud the whole time
    | was on the edge of my seat | found it {adjp+} ~5 | thought it was {pred+} ~5
me-: hated every minute of it ~4 | hated it ~4 | fell asleep halfway through ~2
    | walked out early ~2
    | regretted it within minutes | was bored from start to finish ~2 | struggled to stay awake
    | wanted my money back | had a {adjx-} time ~2 | kept looking at the clock | felt cheated
    | lost interest after ten minutes | disliked every minute | was bored out of my mind
    | suffered through every scene | was disappointed by every scene | hated the {aspect} ~2
    | was bored stiff | was annoyed by every scene | yawned the whole time
    | found it {adjp-} ~5 | thought it was {pred-} ~5
nme+: did not want it to end ~2 | could not look away ~2 | was not bored for a second ~2
    | could not stop smiling | could not stop laughing | did not look at the clock once
    | was not disappointed ~2 | had nothing to complain about | did not regret it
    | could not have asked for more | found nothing to dislike | did not find it {adjg-} at all ~2
    | never lost interest | did not hate a single minute of it | could not find a single fault
nme-: did not enjoy it ~3 | did not laugh once | could not wait for it to end ~2
    | did not like it at all ~2 | could not finish it | did not care about anyone in it
    | could not stay awake | was not impressed ~2 | did not believe a word of it
    | found nothing to like | did not find it {adjg+} at all ~2 | never got into it
    | did not love a single minute of it | could not find a single {adj+} scene | never laughed
plain+: {adjx+} ~2 | {intx} {adjx+} | {adjg+} ~2 | {intg} {adjg+} | {adjg+} and {adjg+}
plain-: {adjx-} ~2 | {intx} {adjx-} | {adjg-} ~2 | {intg} {adjg-} | {adjg-} and {adjg-}
mix+: slow at times but deeply {adjg+} | silly but hugely entertaining | long but {plain+}
    | rough around the edges but full of heart | predictable but {adjg+}
    | {adjg-} at first but {plain+}
    | cheaply made but very funny | badly lit but wonderfully acted | messy but {plain+}
    | confusing in places but {plain+} | a little {adjg-} at the start but {plain+} by the end
    | {adjg-} in parts but {plain+} overall
mix-: gorgeous to look at but painfully slow ~2 | beautifully shot but empty
    | well acted but {plain-}
    | ambitious but {plain-} | cleverly written but badly acted | stylish but hollow
    | promising at first but {plain-} | pretty but {plain-} | {adjg+} at first but {plain-}
    | funny in places but {plain-} | quite {adjg+} at the start but {plain-} by the end
    | {adjg+} in parts but {plain-} overall
some+: a {qadj+} cast | a {qadj+} opening | some {qadj+} songs | a few {qadj+} scenes
    | a {qadj+} idea | all the praise | a {qadj+} score | some {qadj+} camera work | a great trailer
    | one or two {qadj+} jokes | its {qadj+} costumes
some-: a {qadj-} start | some {qadj-} dialogue | a few {qadj-} jokes | a thin plot | a tiny budget
    | one or two {qadj-} scenes | a {qadj-} poster | all the bad press | some {qadj-} songs
    | a {qadj-} trailer | its {qadj-} costumes
hope+: I had high hopes | the trailer looked {adjx+} | everyone told me it was {adjx+}
    | the first scene is {adjx+} | it starts well | I wanted to love it | I loved the book
    | my friends loved it | I usually enjoy {genres} | the critics loved it
hope-: I had low expectations | the trailer looked {adjx-} | everyone told me it was {adjx-}
    | the first scene is {adjx-} | it starts badly | I expected to hate it | I hated the book
    | my friends hated it | I usually avoid {genres} | the critics hated it
    | it takes a while to get going
whole+: I {me+} ~3 | {it} {vp+} ~4 | the result is {pred+} ~2 | the {movie} as a whole is {pred+} ~2
    | it still {works+} | it ends up {ends+}
whole-: I {me-} ~3 | {it} {vp-} ~4 | the result is {pred-} ~2 | the {movie} as a whole is {pred-} ~2
    | it soon {works-} | nothing can save it | it ends up {ends-}
works+: works | charmed me | made me smile | won my heart | feels fresh
works-: falls apart | gets boring | runs out of ideas | annoyed me | feels stale
ends+: a winner | a joy | a delight | a triumph
ends-: a mess | a bore | a chore | a disaster
play+: gives a {qadj+} performance ~3 | lights up every scene | is {r+} ~3 | steals every scene
    | brings real warmth to the part | carries the story with ease | shines in every scene
    | makes every line count | is a joy to watch | is perfect for the part
play-: gives a {qadj-} performance ~3 | mumbles every line | is {r-} ~3 | ruins every scene
    | sleepwalks through the part | is hopelessly miscast | overacts from start to finish
    | looks bored throughout | is painful to watch | is wrong for the part
nplay+: never hits a false note | is never less than {qx+} | has never been better
    | does not waste a single line | is never {rg-} | is anything but {rg-}
nplay-: never convinces | cannot act | does not convince for a second | shows no emotion
    | has never been worse | is never {rg+} | is anything but {rg+} | has no charm at all
dir+: has made a {adj+} {movie} ~4 | knows exactly what works | handles every scene with great skill
    | fills every frame with life | tells the story with wit and grace | has made a masterpiece
    | gets {qadj+} work from the whole cast | hits the right tone in every scene
dir-: has made a {adj-} {movie} ~4 | ruins a promising story | smothers every scene with music
    | has made a complete mess of it | wastes every opportunity | drowns the story in cheap tricks
    | gets {qadj-} work from the whole cast | misses the right tone in every scene
ndir+: never puts a foot wrong | does not waste a minute | never lets the story drag
    | has not made a weak scene here | never loses control of the story
ndir-: has no idea how to tell a story | never finds the right tone | does not trust the audience
    | has nothing to say | never gets control of the story
every+: every scene is {q+} | I especially loved the {aspect} | the best part is the {aspect}
    | I have rarely seen such a {adj+} {movie} | I smiled the whole way home
    | the audience clapped at the end | it is {better+} than {versus} ~3 | it made me very happy
    | the two hours flew by | I left the theater happy | it deserves a big audience
    | the lead actor {play+} ~2 | the whole cast is {r+} ~2 | I loved the characters
    | it is a {adj+} {movie} for the whole family | I was hooked right away
    | the director clearly loves this story | it is {np+} ~3 | it {act+} ~3 | it was {adjp+} ~2
every-: every scene is {q-} | I especially hated the {aspect} | the worst part is the {aspect}
    | I have rarely seen such a {adj-} {movie} | I complained the whole way home
    | half the audience left early | it is {better-} than {versus} ~3 | it made me very angry
    | the two hours felt like four | I left the theater angry | it deserves to be forgotten
    | the lead actor {play-} ~2 | the whole cast is {r-} ~2 | I hated the characters
    | it is a {adj-} {movie} that tries too hard | I was bored right away
    | the director clearly ran out of ideas | it is {np-} ~3 | it {act-} ~3 | it was {adjp-} ~2
nevery+: there is not a dull moment ~3 | it never gets boring | nothing about it feels false
    | I have never laughed so hard | there is nothing to complain about | no scene is wasted
    | you will not be bored | I cannot praise it enough | not one joke falls flat | it {nact+} ~3
    | it is not one of those {adjg-} {genres} | the lead actor {nplay+} | I {nme+} ~2
    | I have not enjoyed a {movie} this much in years | you do not notice the time
nevery-: there is nothing to like here ~2 | it never gets exciting | nothing about it works ~2
    | I have never been so bored | there is no reason to watch it | no scene works
    | you will not be entertained | I cannot recommend it | not one joke lands | it {nact-} ~3
    | it is not one of those {adjg+} {genres} | the lead actor {nplay-} | I {nme-} ~2
    | I have not disliked a {movie} this much in years | you do not care what happens
better+: much better ~3 | far better | funnier | much smarter | far more exciting | warmer
better-: much worse ~3 | far worse | duller | much weaker | far more boring | sillier
tip+: Highly recommended ~3 | I would recommend it to anyone | I would watch it again tomorrow
    | I would recommend this {movie} to anyone who likes {genres} | I would happily watch it again
    | I recommend it to anyone who likes {genres} ~2 | Go and see it ~2
    | I would gladly watch it again ~2 | See it with somebody you love
    | I have already told all my friends to see it | Ten out of ten | Five stars from me
    | I want to see it again ~2 | Buy a ticket today | A must for fans of {genres}
    | I am going to buy it for {who} | What a {adj+} {movie}
tip-: Skip it ~3 | I would rather stay at home | I would rather watch the rain
    | I would demand my money back | Avoid it at all costs ~2 | Stay away ~2 | Save your money ~2
    | Read the book instead
    | I have already told all my friends to avoid it | Two out of ten | One star from me
    | I want my money back ~2 | Find something else to watch | A letdown for fans of {genres}
    | I am going to warn {who} about it | What a {adj-} {movie} | What a waste of time ~2
ntip+: Do not miss it ~3 | You will not regret it ~2 | Nobody should miss this
    | I would not change a thing | Never mind the bad press, just go
    | It does not get better than this
ntip-: Do not bother ~3 | I would not recommend it to anyone ~2 | Nobody should pay to see this
    | I would not watch it again | Never again | It does not get worse than this
    | Do not waste your money
"""

# What each side of a film can be called: name -> (verb number, praise, blame).
_ASPECTS: dict[str, tuple[str, str, str]] = {
    "acting": (
        "s",
        "natural | believable | subtle | full of feeling",
        "wooden | stiff | forced | hammy",
    ),
    "plot": (
        "s",
        "gripping | clever | full of surprises | easy to love",
        "thin | predictable | full of holes | impossible to follow",
    ),
    "story": ("s", "touching | fresh | told with care", "tired | shallow | told without care"),
    "script": (
        "s",
        "sharp | witty | full of wonderful lines | smart",
        "lazy | clumsy | full of terrible lines | stupid",
    ),
    "dialogue": ("s", "crisp | witty | sharp and funny", "stilted | clumsy | dull and fake"),
    "score": ("s", "haunting | lush | a treat for the ears", "loud | grating | a pain in the ears"),
    "music": ("s", "catchy | gorgeous | perfectly chosen", "loud | annoying | badly chosen"),
    "camera work": ("s", "gorgeous | elegant | breathtaking", "shaky | ugly | sloppy"),
    "pacing": ("s", "brisk | just right | tight", "sluggish | painfully slow | all wrong"),
    "ending": (
        "s",
        "satisfying | moving | a lovely surprise | well earned",
        "rushed | silly | a cheap trick | badly botched",
    ),
    "direction": ("s", "confident | inspired | assured", "clumsy | confused | heavy-handed"),
    "editing": ("s", "tight | elegant | smooth", "choppy | careless | sloppy"),
    "humor": ("s", "clever | warm | a delight", "crude | tired | childish"),
    "cast": ("s", "in top form | charming | well chosen", "wooden | dull | badly chosen"),
    "opening": ("s", "gripping | exciting | full of energy", "slow | confusing | full of noise"),
    "second half": ("s", "thrilling | even better | a joy", "tedious | even worse | a mess"),
    "set design": ("s", "gorgeous | elegant | rich in detail", "cheap | ugly | fake"),
    "love story": ("s", "tender | sweet | believable", "forced | sappy | fake"),
    "special effects": ("p", "dazzling | breathtaking | seamless", "cheap | fake | laughable"),
    "costumes": ("p", "gorgeous | lovely | rich in detail", "ugly | cheap | ridiculous"),
    "performances": ("p", "subtle | believable | heartfelt", "wooden | stiff | forced"),
    "jokes": ("p", "clever | hilarious | fresh", "tired | crude | stale"),
    "action scenes": ("p", "thrilling | dazzling | exciting", "confusing | sloppy | dull"),
    "characters": (
        "p",
        "likable | believable | full of life",
        "unlikable | shallow | full of cliches",
    ),
    "songs": ("p", "catchy | joyful | lovely", "forgettable | grating | annoying"),
    "twists": ("p", "clever | thrilling | well planned", "silly | predictable | badly planned"),
    "child actors": ("p", "natural | charming | adorable", "stiff | annoying | whiny"),
    "fight scenes": ("p", "thrilling | elegant | inventive", "clumsy | endless | boring"),
}

# Sides "of" a film; the others are "in" it.
_WHOLE = {"plot", "script", "pacing", "ending", "direction", "cast", "opening", "second half"}

_CONTRACTIONS = tuple(
    (re.compile(rf"\b{full}\b"), short)
    for full, short in (
        ("did not", "didn't"),
        ("Do not", "Don't"),
        ("do not", "don't"),
        ("does not", "doesn't"),
        ("could not", "couldn't"),
        ("would not", "wouldn't"),
        ("was not", "wasn't"),
        ("were not", "weren't"),
        ("is not", "isn't"),
        ("cannot", "can't"),
        ("will not", "won't"),
        ("have not", "haven't"),
        ("It is", "It's"),
        ("I have", "I've"),
    )
)
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|one-|uni|Uni|use|Euro)")
_ASPECT_IN = re.compile(r"\{[pns]_(\w+)")
_REFERENCE = re.compile(r"\{(\w+)([*!+-]?)\}")


def _parse(source: str) -> dict[str, list[str]]:
    """Read ``key: option | option`` lines; an indented line continues the one before."""
    rules: dict[str, list[str]] = {}
    for line in re.sub(r"\n\s+", " ", source.strip()).splitlines():
        key, body = line.split(": ", 1)
        options: list[str] = []
        for option in body.split("|"):
            text, _, weight = option.strip().partition(" ~")
            options += [text] * int(weight or 1)
        rules[key] = options
    return rules


def _plural(option: str) -> str:
    """Turn what "I" did into what "we" did."""
    for single, several in (
        ("was", "were"),
        ("it were", "it was"),
        ("a big smile", "big smiles"),
        ("my mind", "our minds"),
        ("my seat", "our seats"),
        ("my", "our"),
    ):
        option = re.sub(rf"\b{single}\b", several, option)
    return option


def _openings(prefix: str, verdict: dict[str, str]) -> list[str]:
    """First sentences of one kind: a neutral lead, and a verdict that completes it."""
    we = {key: value.replace("me", "us") for key, value in verdict.items() if key == "me"}
    i_did, we_did, film_is = verdict["me"], we["me"], verdict["vp"]
    rules = [
        (6, f"{{leadi}} and I {i_did}"),
        (4, f"{{leadi}} and {i_did}"),
        (4, f"{{leadi}}, and {{it}} {film_is}"),
        (3, f"{{leadi}}. {{It}} {film_is}"),
        (5, f"{{leadwe}} and we {we_did}"),
        (3, f"{{leadwe}}, and {{it}} {film_is}"),
        (11, f"{{leadfilm}} {film_is}"),
        (5, f"{{leadfact}}, and {{it}} {film_is}"),
        (3, f"{{leadfact}}, and I {i_did}"),
        (5, f"{{leadfact}}. {{It}} {film_is}"),
        (2, f"{{leadin}}. {{It}} {film_is}"),
        (2, f"{{leadin}}. I {i_did}"),
        (4, f"{{leadlead}} {verdict['play']}"),
        (3, f"{{leaddir}} {verdict['dir']}"),
        (16, f"{{{prefix}aspectlead*}}"),
    ]
    return [text for weight, text in rules for _ in range(weight)]


def _build_rules() -> dict[str, list[str]]:
    """All rules: the written ones, and those that follow from the list of aspects."""
    rules = _parse(_NEUTRAL) | _parse(_SENTIMENT)
    for name in ("when", "it"):
        rules[name.capitalize()] = [option[0].upper() + option[1:] for option in rules[name]]
    rules["aspect"] = list(_ASPECTS)
    for sign in "+-":
        for name in ("me", "nme"):
            us = name.replace("me", "us")
            rules[us + sign] = [_plural(option) for option in rules[name + sign]]
            extra = (
                ["loved it right away", "had a lot of fun"]
                if sign == "+"
                else ["hated it right away", "had a bad time"]
            )
            rules[us + sign] += extra * 2 if name == "me" else []
        rules["nvp" + sign] = rules["nact" + sign]
    for name, (number, good, bad) in _ASPECTS.items():
        key = name.replace(" ", "_")
        of = "of" if name in _WHOLE else "in"
        now, then = ("is", "was") if number == "s" else ("are", "were")
        for sign, words in (("+", good), ("-", bad)):
            options = _parse(f"x: {words}")["x"]
            rules[f"p_{key}{sign}"] = options * 3 + [f"{{q{sign}}}"] * 2 * len(options)
            simple = [option for option in options if " " not in option]
            rules[f"s_{key}{sign}"] = simple
        p, s = f"{{p_{key}*}}", f"{{s_{key}!}}"
        negated = [f"never {s}", f"not {s} at all", f"anything but {s}", f"far from {s}"]
        negated += [f"not the least bit {s}", f"not even slightly {s}"]
        rules[f"n_{key}"] = negated
        n = f"{{n_{key}}}"
        for sign in "+-":
            lead = rules.setdefault(f"aspectlead{sign}", [])
            lead += [f"The {name} {of} {{thisfilm}} {now} {p}"] * 5
            lead += [f"The {name} {of} {{thisfilm}} {then} {p}"] * 3
            lead += [f"The {name} {of} this {{movie}} about {{tale}} {now} {p}"] * 2
            lead += [f"{{When}} I watched {{thisfilm}}, and the {name} {then} {p}"]
            nlead = rules.setdefault(f"naspectlead{sign}", [])
            nlead += [f"The {name} {of} {{thisfilm}} {now} {n}"] * 2
            nlead += [f"The {name} {of} {{thisfilm}} {then} {n}"]
            clead = rules.setdefault(f"caspectlead{sign}", [])
            for be in (now, now, then):
                side = "side" if be == now else "sidepast"
                begun = f"The {name} {of} {{thisfilm}} {be} {{p_{key}!}}, but"
                clead += [f"{begun} {{whole*}}"] * 2 + [f"{begun} {{{side}*}}"]
            rules.setdefault(f"side{sign}", []).append(f"the {name} {now} {p}")
            rules.setdefault(f"sidepast{sign}", []).append(f"the {name} {then} {p}")
            rules.setdefault(f"nside{sign}", []).append(f"the {name} {now} {n}")
    plain = {"me": "{me*}", "vp": "{vp*}", "play": "{play*}", "dir": "{dir*}"}
    negation = {"me": "{nme*}", "vp": "{nvp*}", "play": "{nplay*}", "dir": "{ndir*}"}
    rules["first_plain"] = _openings("", plain)
    rules["first_negation"] = _openings("n", negation)
    rules["early_plain"] = _parse("""
x: This {movie} was {pred*} ~6 | This {movie} is {pred*} ~5 | This {movie} was {adjp*}, I {me*} ~4
    | I {really} {love*} this {movie} ~2 | What a {adj*} {genre} | This {movie} {act*} ~2
    | This is {np*} | This {genre} is {pred*} ~2 | This {movie} was {adjp*}, {np*} ~3
    | I {love*} {thisfilm} about {tale}
""")["x"]
    rules |= _parse("""
early_negation: This {movie} {nact*} ~4 | I {unlike*} this {movie} ~2
early_contrast: This {movie} is {mix*} ~3 | This {movie} has {some!}, but {whole*} ~2
unlike+: could not get enough of | cannot stop thinking about | did not dislike | did not hate
unlike-: did not like | did not enjoy | cannot recommend | would not recommend
really: really | truly | just
love+: loved ~3 | enjoyed | adored | liked | love
love-: hated ~3 | disliked | detested | hate
""")
    rules["first_contrast"] = _parse("""
x: {leadi}, and although {sidepast!}, {it} was {pred*} ~2 | {leadi} and found it {mix*} ~3
    | {leadi}, and although {sidepast!}, I {me*} ~3 | {leadi}, and despite {some!}, I {me*} ~2
    | {leadwe}, and even though {sidepast!}, we {us*} ~2 | {leadwe} and found it {mix*} ~2
    | {leadfilm} is {mix*} ~5 | {leadfilm} has {some!}, but {whole*} ~3
    | {leadfact}. {Although} {side!}, {whole*} ~3 | {leadfact}, and it is {mix*} ~2
    | {leadi}. {Hope!}, but {whole*} ~4 | {leadfact}. Despite {some!}, {whole*} ~2
    | {caspectlead*} ~9
""")["x"]
    rules["Although"] = ["Although", "Although", "Even though", "While"]
    for sign in "+-":
        rules["Hope" + sign] = [option[0].upper() + option[1:] for option in rules["hope" + sign]]
    rules["more_plain"] = _parse("""
x: {side*} ~5 | {side*}, and {side*} ~3 | {sidepast*}, and {sidepast*} ~2 | {every*} ~7
""")["x"]
    rules["more_negation"] = _parse("x: {nevery*} ~4 | {nside*} ~3 | {nside*}, and {nside*}")["x"]
    rules["more_contrast"] = _parse("""
x: {side!}, but {side*} ~2 | {side!}, but {whole*} ~3 | although {side!}, {whole*} ~2
    | even though {side!}, {side*} | despite {some!}, {whole*} ~2 | {hope!}, but {whole*} ~3
    | while {side!}, {whole*} | it is {mix*} ~2
""")["x"]
    return rules


_Part = str | tuple[str, str]
_Compiled = tuple[tuple[str, tuple[_Part, ...]], ...]


def _compile(rules: dict[str, list[str]]) -> dict[str, tuple[_Compiled, list[int]]]:
    """Cut every option into literal text and references once, so that expanding is quick."""
    compiled: dict[str, tuple[_Compiled, list[int]]] = {}
    for key, options in rules.items():
        weights: dict[str, int] = {}
        for option in options:
            weights[option] = weights.get(option, 0) + 1
        cut: list[tuple[str, tuple[_Part, ...]]] = []
        for option in weights:
            parts: list[_Part] = []
            position = 0
            for match in _REFERENCE.finditer(option):
                if match.start() > position:
                    parts.append(option[position : match.start()])
                parts.append((match.group(1), match.group(2)))
                position = match.end()
            if position < len(option):
                parts.append(option[position:])
            aspect = None if key[:2] == "n_" else _ASPECT_IN.search(option)
            name = aspect.group(1) if aspect else option.replace(" ", "_")
            cut.append((name if key == "aspect" or aspect else option, tuple(parts)))
        compiled[key] = (tuple(cut), list(accumulate(weights.values())))
    return compiled


_RULES = _compile(_build_rules())


class _Writer:
    """Writes one review, and avoids saying the same thing twice in it."""

    def __init__(self, rng: random.Random, positive: bool) -> None:
        self.rng = rng
        self.positive = positive
        self.used: set[str] = set()
        self.seen: set[str] = set()

    def expand(self, key: str, positive: bool | None = None) -> str:
        positive = self.positive if positive is None else positive
        self.seen.add(key)
        options, totals = _RULES[key]
        if len(options) == 1:
            option, parts = options[0]
        else:
            for _ in range(6):
                option, parts = self.rng.choices(options, cum_weights=totals)[0]
                if option not in self.used:
                    break
        # The nouns for the film itself are meant to come back, whatever else is said once.
        if key not in ("movie", "it", "It"):
            self.used.add(option)
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            name, mark = part
            if mark in "+-" and mark:
                text += self.expand(name + mark, mark == "+")
            elif mark:
                wanted = positive if mark == "*" else not positive
                text += self.expand(name + ("+" if wanted else "-"), wanted)
            else:
                text += self.expand(name, positive)
        return text

    def fact(self) -> str:
        """A neutral remark that does not contradict what has been said about the film."""
        plot = ("tale", "role", "setting", "place", "based", "start", "group")
        keys = ["fact"]
        if self.seen.isdisjoint(plot):
            keys += ["plotfact", "plotfact"]
        if self.seen.isdisjoint(("who", "when", "where", "after", "pair", "leadi", "leadwe")):
            keys.append("seenfact")
        return self.expand(self.rng.choice(keys))


def _sentence(text: str, end: str = ".") -> str:
    """Capitalise and close a sentence."""
    text = text[0].upper() + text[1:]
    return text if text[-1] in _ENDS else text + end


def _write(rng: random.Random) -> Review:
    positive = rng.random() < 0.5
    kind = rng.choices(KINDS, weights=_KIND_WEIGHTS)[0]
    writer = _Writer(rng, positive)
    early = rng.random() < (0.13 if kind == "plain" else 0.06)
    sentences = [_sentence(writer.expand(f"early_{kind}" if early else f"first_{kind}"))]
    roll = rng.random()
    extra = 0 if roll < 0.12 else 1 if roll < 0.55 else 2 if roll < 0.9 else 3
    if ". " in sentences[0]:
        extra = min(extra, 2)
    # A negated or contrasting verdict often stands alone, so that it alone decides the label.
    alone = kind != "plain" and rng.random() < 0.5
    for index in range(extra):
        roll = rng.random()
        if alone:
            key = "fact" if roll < 0.7 else f"more_{kind}"
        elif kind == "plain":
            key = "fact" if roll < 0.14 and index == 0 else "more_plain"
        else:
            key = "fact" if roll < 0.1 else f"more_{kind}" if roll < 0.5 else "more_plain"
        if index == extra - 1 and rng.random() < 0.4 and not (alone and kind == "contrast"):
            tip = "ntip" if kind == "negation" and (alone or rng.random() < 0.5) else "tip"
            key = tip + ("+" if positive else "-")
        if key == "fact":
            sentences.append(_sentence(writer.fact()))
        else:
            end = "!" if "tip" in key and rng.random() < 0.15 else "."
            sentences.append(_sentence(writer.expand(key), end))
    text = " ".join(sentences)
    if len(text.split()) < 12:
        text += " " + _sentence(writer.fact())
    if rng.random() < 0.4:
        for pattern, short in _CONTRACTIONS:
            text = pattern.sub(short, text)
    return Review(_ARTICLE.sub(r"\1n ", text), int(positive), kind)


def reviews(count: int, seed: int) -> list[Review]:
    """Write ``count`` reviews; the same seed always gives the same ones."""
    rng = random.Random(seed)
    return [_write(rng) for _ in range(count)]
