/** The table of all tensors: only rows in sight are elements, so that a hundred thousand scroll. */
import { fill, h, s, visible } from '../dom'
import { bytes, count, human, number, shape, share } from '../format'
import { naturally } from '../model'
import type { State } from '../state'

const ROW = 30
const HEAD = 54 // pixels of the head, the border, and a bar to scroll by
const AROUND = 12 // rows that are drawn above and below those in sight
const MOST_PIXELS = 15_000_000 // browsers lose precision beyond; then the bar stands for more than its pixels

interface Column {
  key: string
  label: string
  about: string
  width: string
  text(row: number): string | Node
  /** What it is sorted by; text sorts naturally. */
  value(row: number): number | string
  left?: boolean
}

export class TensorTable {
  #columns: Column[]
  #order: Uint32Array
  #sort: { key: string; down: boolean } | null = null
  #first = -1
  #last = -1
  #active = 0
  readonly #head = h('div', { class: 'row head', role: 'row' })
  readonly #body = h('div', { class: 'rows', role: 'rowgroup' })
  readonly #scroll: HTMLElement
  readonly #said = h('p', { class: 'note', role: 'status' })

  constructor(
    readonly state: State,
    readonly root: HTMLElement,
  ) {
    this.#columns = this.columns()
    this.#order = new Uint32Array()
    this.#scroll = h(
      'div',
      { class: 'table', role: 'grid', tabindex: 0, 'aria-label': 'Tensors', scroll: () => this.rows(), keydown: (event: KeyboardEvent) => this.key(event) },
      this.#head,
      this.#body,
    )
    fill(root, this.#said, this.#scroll)
    this.filter()
    new ResizeObserver(() => this.rows(true)).observe(this.#scroll)
    state.listen((change) => {
      if (change === 'selection') this.filter()
      else if (change === 'step') this.#sort ? this.filter() : this.rows(true)
      else if (change === 'statistic') {
        this.#columns = this.columns()
        this.filter()
      } else if (change === 'tensor') this.rows(true)
    })
  }

  private columns(): Column[] {
    const { state } = this
    const { model } = state
    const { a } = model
    const column = (key: string, label: string, about: string): Column => ({
      key, label, about, width: '88px',
      value: (row) => (a.read(row) ? a.get(key)[row] : NaN),
      text: (row) => (a.read(row) ? number(a.get(key)[row]) : '–'),
    })
    const found: Column[] = [
      { key: 'name', label: 'name', about: 'name of the tensor', width: 'minmax(340px, 1fr)', left: true, value: (row) => model.names[row], text: (row) => this.name(row) },
      { key: 'shape', label: 'shape', about: 'sizes of the dimensions', width: '132px', value: (row) => model.shapeOf(row)?.reduce((x, y) => x * y, 1) ?? -1, text: (row) => shape(model.shapeOf(row)) },
      { key: 'type', label: 'type', about: 'dtype, or how a quantised tensor is stored', width: '112px', left: true, value: (row) => model.typeOf(row), text: (row) => model.typeOf(row) },
      { key: 'nbytes', label: 'size', about: 'bytes as stored', width: '84px', value: (row) => model.nbytes[row], text: (row) => bytes(model.nbytes[row]) },
    ]
    if (model.status) {
      const status = model.status
      found.push({ key: 'status', label: 'status', about: 'how B differs from A', width: '86px', left: true, value: (row) => status.at(row), text: (row) => status.at(row).replace('_', ' ') })
    }
    let shown = model.difference ? ['relative', 'share', 'sqnr'] : (model.over?.keys ?? [])
    const { statistic } = state
    const own = model.over ? ['nbytes'] : ['mean', 'std', 'zeros', 'kurtosis', 'nbytes']
    if (![...own, ...shown].includes(statistic.key)) shown = [...shown, statistic.key]
    for (const key of shown) {
      const each = state.statistics.find((one) => one.key === key)!
      found.push({ key, label: each.label, about: each.about, width: '96px', value: each.value, text: (row) => each.format(each.value(row)) })
    }
    if (model.over) return found
    found.push(
      column('std', 'std', 'standard deviation'),
      column('mean', 'mean', 'mean of the finite values'),
      column('min', 'min', 'least value'),
      column('max', 'max', 'greatest value'),
      { key: 'zeros', label: 'zeros', about: 'share of the values that are 0', width: '74px', value: (row) => (a.read(row) ? a.get('zeros')[row] / a.get('values')[row] : NaN), text: (row) => (a.read(row) && a.get('zeros')[row] ? share(a.get('zeros')[row] / a.get('values')[row]) : '') },
      { ...column('kurtosis', 'kurtosis', 'excess kurtosis: 0 of a normal distribution'), width: '80px' },
      { key: 'histogram', label: 'values', about: 'histogram of the values', width: '104px', value: (row) => (a.read(row) ? a.get('linf')[row] : NaN), text: (row) => this.spark(row) },
    )
    return found
  }

  private name(row: number): Node {
    const { model } = this.state
    const finding = model.flagged.get(row)?.[0]?.[0]
    const name = model.names[row]
    return h('span', { class: 'name', title: visible(name) },
      finding ? h('i', { class: `dot ${finding.severity}`, title: finding.title }) : null, name)
  }

  private spark(row: number): Node {
    const found = this.state.model.a.histogram(row)
    if (!found) return document.createTextNode('')
    const n = found.counts.length
    const most = Math.max(...found.counts) || 1
    let path = 'M0,20'
    for (let i = 0; i < n; i++) path += `V${(20 - (18 * found.counts[i]) / most).toFixed(1)}H${((92 * (i + 1)) / n).toFixed(1)}`
    return s('svg', { class: 'spark', width: 92, height: 20, 'aria-hidden': 'true' }, s('path', { d: `${path}V20Z` }))
  }

  /** Takes the selected rows, in the order that the table is sorted by. */
  private filter(): void {
    const { state } = this
    const rows: number[] = []
    for (let row = 0; row < state.model.size; row++) if (state.hit(row)) rows.push(row)
    if (this.#sort) {
      const { key, down } = this.#sort
      const found = this.#columns.find((column) => column.key === key)
      if (found) {
        const values = rows.map((row): [number, number | string] => [row, found.value(row)])
        const sign = down ? -1 : 1
        values.sort(([i, x], [j, y]) => {
          if (typeof x === 'string' || typeof y === 'string') return sign * naturally(String(x), String(y)) || i - j
          if (Number.isNaN(x) || Number.isNaN(y)) return Number(Number.isNaN(x)) - Number(Number.isNaN(y)) || i - j
          return sign * (x - y) || i - j
        })
        values.forEach(([row], i) => (rows[i] = row))
      }
    }
    this.#order = Uint32Array.from(rows)
    this.#active = Math.min(this.#active, Math.max(rows.length - 1, 0))
    this.header()
    const pixels = Math.min(rows.length * ROW, MOST_PIXELS)
    this.#body.style.height = `${pixels}px`
    this.#scroll.style.height = `min(74vh, 760px, ${pixels + HEAD}px)`
    this.#scroll.setAttribute('aria-rowcount', String(rows.length + 1))
    let numel = 0
    let nbytes = 0
    for (const row of rows) {
      numel += state.model.numel[row]
      nbytes += state.model.nbytes[row]
    }
    fill(this.#said, `${count(rows.length)} of ${count(state.model.size)} tensors · ${human(numel)} elements · ${bytes(nbytes)}`)
    this.rows(true)
  }

  private header(): void {
    const template = this.#columns.map((column) => column.width).join(' ')
    this.#scroll.style.setProperty('--columns', template)
    fill(
      this.#head,
      ...this.#columns.map((column) => {
        const sorted = this.#sort?.key === column.key
        return h(
          'button',
          {
            type: 'button',
            role: 'columnheader',
            class: column.left ? 'left' : '',
            title: column.about,
            'data-key': column.key,
            'aria-sort': sorted ? (this.#sort!.down ? 'descending' : 'ascending') : 'none',
            click: () => this.sort(column),
          },
          column.label,
          h('i', { class: 'arrow' }, sorted ? (this.#sort!.down ? '↓' : '↑') : ''),
        )
      }),
    )
  }

  private sort(column: Column): void {
    const numbers = typeof column.value(0) !== 'string'
    if (this.#sort?.key !== column.key) this.#sort = { key: column.key, down: numbers }
    else if (this.#sort.down === numbers) this.#sort = { key: column.key, down: !numbers }
    else this.#sort = null
    this.#scroll.scrollTop = 0
    this.filter()
  }

  /** Pixels of the scrolled body for each row: fewer than a row has where there are too many rows. */
  private get pitch(): number {
    const n = this.#order.length
    return n * ROW <= MOST_PIXELS ? ROW : MOST_PIXELS / n
  }

  private rows(anew = false): void {
    const { pitch } = this
    const n = this.#order.length
    const { scrollTop, clientHeight } = this.#scroll
    const top = Math.floor(scrollTop / pitch)
    const first = Math.max(0, top - AROUND)
    const last = Math.min(n, top + Math.ceil((clientHeight || 600) / ROW) + AROUND)
    if (!anew && first === this.#first && last === this.#last) return
    this.#first = first
    this.#last = last
    const shown: HTMLElement[] = []
    for (let i = first; i < last; i++) {
      const row = this.#order[i]
      const line = h(
        'div',
        {
          class: `row${row === this.state.open ? ' open' : ''}${i === this.#active ? ' active' : ''}`,
          role: 'row',
          id: `row-${row}`,
          'aria-rowindex': i + 2,
          click: () => {
            this.#active = i
            this.state.show(row)
          },
        },
        ...this.#columns.map((column) => h('div', { role: 'gridcell', class: column.left ? 'left' : '', 'data-key': column.key }, column.text(row))),
      )
      line.style.top = `${top * pitch + (i - top) * ROW}px`
      shown.push(line)
    }
    this.#body.replaceChildren(...shown)
    if (n) this.#scroll.setAttribute('aria-activedescendant', `row-${this.#order[this.#active]}`)
  }

  private key(event: KeyboardEvent): void {
    if (event.target !== this.#scroll) return
    const page = Math.max(1, Math.floor(this.#scroll.clientHeight / ROW) - 2)
    const steps: Record<string, number> = {
      ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.#order.length, End: this.#order.length,
    }
    if (event.key === 'Enter' && this.#order.length) this.state.show(this.#order[this.#active])
    else if (event.key in steps) {
      this.#active = Math.max(0, Math.min(this.#order.length - 1, this.#active + steps[event.key]))
      const { pitch } = this
      const [top, height] = [this.#active * pitch, this.#scroll.clientHeight - ROW * 2]
      if (top < this.#scroll.scrollTop) this.#scroll.scrollTop = top
      else if (top > this.#scroll.scrollTop + height) this.#scroll.scrollTop = top - height
      this.rows(true)
    } else return
    event.preventDefault()
  }
}
