/**
 * Globs: patterns of whole dotted names. The same as `globs.py`, `glob_reader.py` and `glob_match.py` of
 * `torchparams/_selector`, function by function.
 *
 * A component is a sequence of pieces; `**` is the component `null`.
 */
import { SelectorError } from './errors'

export interface Range {
  kind: 'range'
  first: bigint
  last: bigint
  width: number
}
export interface Alternatives {
  kind: 'alternatives'
  items: Piece[][]
}
export type Piece = string | { kind: '?' } | { kind: '*' } | Range | Alternatives
/** A component, or null for `**`. */
export type Component = Piece[] | null

export interface Glob {
  kind: 'glob'
  components: Component[]
}

/** Most digits of a bound of a range: numbers of 64 bits. */
export const RANGE_DIGITS = 18
export const NESTING = 32

const RESERVED = new Set('|&~()[]:,;!=<>"\'`\\{}*?')

/** As Python's `str.isspace`, of one character. */
export function isSpace(char: string): boolean {
  return /^[\s\x1c-\x1f\x85]$/u.test(char) && char !== '\ufeff'
}

/** As Python's `str.isprintable`, of one character. */
function isPrintable(char: string): boolean {
  return char === ' ' || !/[\p{C}\p{Z}]/u.test(char)
}

function isBare(char: string): boolean {
  return !RESERVED.has(char) && isPrintable(char) && !isSpace(char)
}

function inComponent(char: string): boolean {
  return char !== '.' && char !== '' && ('*?{"\'\\'.includes(char) || isBare(char))
}

export function startsGlob(char: string): boolean {
  return char !== '/' && inComponent(char)
}

/** A range's widths: how many digits its numbers have. */
function widths(range: Range): number[] {
  if (range.width) return [range.width]
  const found = []
  for (let w = String(range.first).length; w <= String(range.last).length; w++) found.push(w)
  return found
}

const fromEnd = (range: Range) => range.first < 0n || range.last < 0n

function countsFromEnd(pieces: Piece[]): boolean {
  return pieces.some(
    (piece) =>
      typeof piece !== 'string' &&
      ((piece.kind === 'range' && fromEnd(piece)) ||
        (piece.kind === 'alternatives' && piece.items.some(countsFromEnd))),
  )
}

/** Whether some number of a glob counts from the end, so that what it matches depends on the other names. */
export function globFromEnd(glob: Glob): boolean {
  return glob.components.some((component) => component !== null && countsFromEnd(component))
}

/** The one name that a glob matches, where it has no wildcards. */
export function literalOf(glob: Glob): string | null {
  const parts = []
  for (const component of glob.components) {
    if (component === null || component.some((piece) => typeof piece !== 'string')) return null
    parts.push(component.join(''))
  }
  return parts.join('.')
}

/** Whether one of the components is exactly this text. */
export function globSpells(glob: Glob, text: string): boolean {
  return glob.components.some((each) => each !== null && each.length === 1 && each[0] === text)
}

// --- text → glob ----------------------------------------------------------------------------------

/** Reads the glob that begins at `chars[at]`; gives it and where it ends. */
export function readGlob(chars: string[], at: number): [Glob, number] {
  const reader = new Reader(chars, at)
  return [reader.glob(), reader.at]
}

const BOUNDS = /^([0-9]+|-[1-9][0-9]*)\.\.([0-9]+|-[1-9][0-9]*)(?=\s*[,}]|\s*$)/
const FROM_END = /^(-[1-9][0-9]*)(?=\s*[,}])/

class Reader {
  constructor(
    readonly chars: string[],
    public at: number,
  ) {}

  peek(ahead = 0): string {
    return this.chars[this.at + ahead] ?? ''
  }

  fail(expected: string, hint = '', at = this.at): never {
    throw new SelectorError(`expected ${expected}`, at + 1, expected, hint)
  }

  glob(): Glob {
    const components: Component[] = []
    let pieces: Piece[] = []
    let depth = false // whether the component is `**`
    let written = false // a component may be empty only where quotes say so
    const done = () => {
      components.push(depth ? null : merged(pieces))
      pieces = []
      depth = written = false
    }
    for (;;) {
      const char = this.peek()
      if (char === '*' && this.peek(1) === '*') {
        if (written || inComponent(this.peek(2))) {
          this.fail('`**` to be a whole component, between dots', 'within a component, `*` is any characters')
        }
        depth = written = true
        this.at += 2
      } else if (char === '*' || char === '?') {
        pieces.push({ kind: char })
        this.at += 1
        written = true
      } else if (char === '.') {
        this.whole(written)
        done()
        this.at += 1
      } else if (char === '{') {
        pieces.push(this.braces(1))
        written = true
      } else if (char && ('"\'\\'.includes(char) || isBare(char))) {
        const [first, ...rest] = this.literal().split('.')
        pieces.push(first)
        for (const component of rest) {
          done()
          pieces = [component]
        }
        written = true
      } else {
        this.whole(written, components.length > 0)
        done()
        if (components.some((component) => component !== null && misplaced(component))) {
          this.fail(
            'a number that counts from the end to be a whole component',
            'the last two layers are layers.{-2..-1}.**',
          )
        }
        return { kind: 'glob', components }
      }
    }
  }

  whole(written: boolean, ended = false): void {
    if (written) return
    if (ended) {
      const text = this.chars.slice(0, this.at).join('')
      this.fail('a component after the dot', `\`${text}**\` is everything below a module`)
    }
    this.fail('a component of a name', 'components are joined by single dots; an empty one is written ""')
  }

  literal(): string {
    const opening = this.peek()
    if (opening === '\\') {
      if (!this.peek(1)) {
        this.at += 1
        this.fail('a character after the backslash', 'a backslash takes its meaning from the next character')
      }
      this.at += 2
      return this.chars[this.at - 1]
    }
    if (opening === "'" || opening === '"') return this.quoted()
    const start = this.at
    for (let char = this.peek(); char && char !== '.' && isBare(char); char = this.peek()) this.at += 1
    return this.chars.slice(start, this.at).join('')
  }

  quoted(): string {
    const opening = this.peek()
    const start = this.at
    this.at += 1
    let found = ''
    for (let char = this.peek(); char !== opening; char = this.peek()) {
      if (char === '\\') {
        this.at += 1
        char = this.peek()
      }
      if (!char) this.fail(`a closing ${opening}`, `the quote at column ${start + 1} is not closed`)
      found += char
      this.at += 1
    }
    this.at += 1
    return found
  }

  braces(depth: number): Piece {
    const opening = this.at
    if (depth > NESTING) this.fail(`braces nested at most ${NESTING} deep`)
    this.at += 1
    const items: Piece[][] = []
    for (;;) {
      items.push(this.item(depth, opening))
      if (this.peek() === ',') {
        this.at += 1
        continue
      }
      if (items.length > 1) {
        this.at += 1
        return { kind: 'alternatives', items }
      }
      const [only] = items[0]
      if (items[0].length === 1 && typeof only !== 'string' && only.kind === 'range') {
        this.at += 1
        return only
      }
      this.fail('`,` or `..` in the braces', 'alternatives are written {a,b}, a range {0..5}')
    }
  }

  item(depth: number, opening: number): Piece[] {
    this.blanks()
    const range = this.range()
    if (range) {
      this.blanks()
      if (this.peek() !== ',' && this.peek() !== '}') this.unclosed(opening)
      return [range]
    }
    const pieces: Piece[] = []
    for (;;) {
      const char = this.peek()
      if (char === '*' && this.peek(1) === '*') {
        this.fail('`*`, any characters of one component', '`**` stands outside of braces, between dots')
      }
      if (char === '*' || char === '?') {
        pieces.push({ kind: char })
        this.at += 1
      } else if (char === '{') {
        pieces.push(this.braces(depth + 1))
      } else if (char === '.') {
        if (this.peek(1) === '.') this.fail('whole numbers on both sides of `..`', 'a range is written {0..5}')
        this.dot()
      } else if (char && ('"\'\\'.includes(char) || isBare(char))) {
        const start = this.at
        const literal = this.literal()
        pieces.push(literal)
        if (literal.includes('.')) this.dot(start)
      } else {
        this.blanks()
        if (this.peek() === ',' || this.peek() === '}') return merged(pieces)
        this.unclosed(opening)
      }
    }
  }

  range(): Range | null {
    const rest = this.chars.slice(this.at, this.at + 200).join('')
    const bounds = BOUNDS.exec(rest)
    if (!bounds) {
      const one = FROM_END.exec(rest)
      if (!one || one[1].length > RANGE_DIGITS) return null
      this.at += one[0].length
      return { kind: 'range', first: BigInt(one[1]), last: BigInt(one[1]), width: 0 }
    }
    const [whole, first, last] = bounds
    for (const name of [first, last]) {
      if (name.replace('-', '').length > RANGE_DIGITS) this.fail(`a number of at most ${RANGE_DIGITS} digits`)
    }
    const low = BigInt(first)
    const high = BigInt(last)
    if (first.startsWith('-') !== last.startsWith('-')) {
      this.at += whole.length
      return { kind: 'range', first: low, last: high, width: 0 }
    }
    let width = 0
    if ([first, last].some((bound) => bound.length > 1 && bound.startsWith('0'))) {
      width = first.length
      if (last.length !== width) {
        this.fail('bounds of one width', 'leading zeros are in both bounds or in none')
      }
    }
    if (low > high) this.fail('a range that goes up', `did you mean {${last}..${first}}?`)
    this.at += whole.length
    return { kind: 'range', first: low, last: high, width }
  }

  blanks(): void {
    while (this.peek() && isSpace(this.peek())) this.at += 1
  }

  dot(at = this.at): never {
    this.fail(
      'alternatives without a dot: braces stand within one component',
      'a union is written `a.b.** | c.**`',
      at,
    )
  }

  unclosed(opening: number): never {
    this.fail('`,` or `}`', this.peek() ? '' : `the brace at column ${opening + 1} is not closed`)
  }
}

/** Whether a number that counts from the end has something beside it. */
function misplaced(component: Piece[]): boolean {
  if (component.length === 1) {
    const [piece] = component
    return typeof piece !== 'string' && piece.kind === 'alternatives' && piece.items.some(misplaced)
  }
  return countsFromEnd(component)
}

function merged(pieces: Piece[]): Piece[] {
  const found: Piece[] = []
  for (const piece of pieces) {
    if (piece === '') continue
    const last = found[found.length - 1]
    if (typeof piece === 'string' && typeof last === 'string') found[found.length - 1] = last + piece
    else if (!(isStar(piece) && isStar(last))) found.push(piece)
  }
  return found
}

function isStar(piece: Piece | undefined): boolean {
  return typeof piece === 'object' && piece.kind === '*'
}

// --- glob → text ----------------------------------------------------------------------------------

export function writeGlob(glob: Glob): string {
  const text = glob.components.map((each) => (each === null ? '**' : each.map(writePiece).join('') || '""')).join('.')
  if (!text.startsWith('/')) return text
  const first = String(glob.components[0]![0]) // bare in front, its slash would begin a regular expression
  return quoted(first) + text.slice(first.length)
}

/** The selector of exactly one name. */
export function quoteName(name: string): string {
  return writeGlob({ kind: 'glob', components: name.split('.').map((part) => (part ? [part] : [])) })
}

function writePiece(piece: Piece): string {
  if (typeof piece === 'string') return Array.from(piece).every(isBare) ? piece : quoted(piece)
  if (piece.kind === 'range') return `{${writeRange(piece)}}`
  if (piece.kind === 'alternatives') return `{${piece.items.map(writeItem).join(',')}}`
  return piece.kind
}

function writeItem(item: Piece[]): string {
  const [only] = item
  if (item.length === 1 && typeof only === 'object' && only.kind === 'range') return writeRange(only)
  if (item.length === 1 && typeof only === 'string' && /^-[1-9][0-9]*$/.test(only)) return quoted(only)
  return item.map(writePiece).join('')
}

function writeRange(range: Range): string {
  if (fromEnd(range) && range.first === range.last) return String(range.first)
  return [range.first, range.last].map((bound) => String(bound).padStart(range.width, '0')).join('..')
}

function quoted(text: string): string {
  return '"' + text.replaceAll('\\', '\\\\').replaceAll('"', '\\"') + '"'
}

// --- what a glob means ----------------------------------------------------------------------------

/**
 * A function that tells whether a glob matches the whole of a name.
 *
 * What a component fits is remembered by its text: names share most of theirs.
 */
export function globMatcher(glob: Glob, numbers: (module: string) => bigint[]): (name: string) => boolean {
  const known = glob.components.map(() => new Map<string, boolean>())
  const relative = glob.components.map((component) => component !== null && countsFromEnd(component))
  return (name) => {
    const parts = name.split('.')
    let reached = new Set([0])
    glob.components.forEach((component, k) => {
      const next = new Set<number>()
      if (component === null) {
        if (reached.size) for (let at = Math.min(...reached); at <= parts.length; at++) next.add(at)
      } else {
        for (const at of reached) {
          if (at >= parts.length) continue
          const part = parts[at]
          let fit: boolean | undefined
          if (relative[k]) {
            const there = among(component, numbers(parts.slice(0, at).join('.')))
            fit = there !== null && fits(there, part)
          } else {
            fit = known[k].get(part)
            if (fit === undefined) known[k].set(part, (fit = fits(component, part)))
          }
          if (fit) next.add(at + 1)
        }
      }
      reached = next
    })
    return reached.has(parts.length)
  }
}

/** Ranges that count from the end as ranges of the numbers that occur; null where nothing is left to match. */
function among(pieces: Piece[], numbers: bigint[]): Piece[] | null {
  const found: Piece[] = []
  for (const piece of pieces) {
    if (typeof piece === 'object' && piece.kind === 'range' && fromEnd(piece)) {
      let { first, last } = piece
      const at = (index: bigint) => numbers[numbers.length + Number(index)]
      if (first < 0n) first = numbers.length ? at(first < -BigInt(numbers.length) ? -BigInt(numbers.length) : first) : last + 1n
      if (last < 0n) last = -last <= BigInt(numbers.length) ? at(last) : -1n
      if (first > last) return null
      found.push({ kind: 'range', first, last, width: 0 })
    } else if (typeof piece === 'object' && piece.kind === 'alternatives') {
      const items = piece.items.map((item) => among(item, numbers)).filter((item) => item !== null)
      if (!items.length) return null
      found.push({ kind: 'alternatives', items })
    } else {
      found.push(piece)
    }
  }
  return found
}

function fits(component: Piece[], part: string): boolean {
  const chars = Array.from(part)
  return ends(component, chars, new Set([0])).has(chars.length)
}

/** Where a sequence can end in a text, begun at any of `starts`: sets, so that no choice is made twice. */
function ends(pieces: Piece[], text: string[], starts: Set<number>): Set<number> {
  for (const piece of pieces) {
    if (!starts.size) break
    const next = new Set<number>()
    if (typeof piece === 'string') {
      const wanted = Array.from(piece)
      for (const at of starts) if (wanted.every((char, i) => text[at + i] === char)) next.add(at + wanted.length)
    } else if (piece.kind === '?') {
      for (const at of starts) if (at < text.length) next.add(at + 1)
    } else if (piece.kind === '*') {
      for (let at = Math.min(...starts); at <= text.length; at++) next.add(at)
    } else if (piece.kind === 'range') {
      for (const at of starts) {
        for (const w of widths(piece)) if (inRange(piece, text.slice(at, at + w).join(''), w)) next.add(at + w)
      }
    } else {
      for (const item of piece.items) for (const at of ends(item, text, starts)) next.add(at)
    }
    starts = next
  }
  return starts
}

function inRange(range: Range, digits: string, width: number): boolean {
  if (digits.length !== width || !/^[0-9]+$/.test(digits)) return false
  if (width > 1 && !range.width && digits.startsWith('0')) return false
  return range.first <= BigInt(digits) && BigInt(digits) <= range.last
}
