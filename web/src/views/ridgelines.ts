/** Ridgelines: how the distribution of one role moves over the layers. */
import { scaleLinear } from 'd3-scale'
import { area, curveBasis } from 'd3-shape'
import { axisBottom } from 'd3-axis'
import { select } from 'd3-selection'
import { fill, h, onWidth, s, visible } from '../dom'
import { count, plural, tick } from '../format'
import type { Stack } from '../model'
import type { State } from '../state'
import { hideTip, tensorTip } from '../tip'

const MOST = 160

export class Ridgelines {
  readonly #figure = h('div', { class: 'ridges' })
  readonly #select: HTMLSelectElement
  readonly #roles: { stack: Stack; role: number; label: string }[] = []
  #current = 0

  constructor(
    readonly state: State,
    readonly root: HTMLElement,
  ) {
    for (const stack of state.model.stacks) {
      if (!stack.numbered) continue
      stack.roles.forEach((role, i) => {
        const label = stack.title ? `${stack.title}.*.${role}` : `*.${role}`
        if (this.rowsOf(stack, i).length > 1) this.#roles.push({ stack, role: i, label })
      })
    }
    this.#select = h('select', { 'aria-label': 'Role', change: () => this.show(Number(this.#select.value)) })
    if (!this.#roles.length) {
      root.closest('section')!.hidden = true // no role stands in more than one layer
      document.querySelector<HTMLElement>('nav a[href="#shapes"]')!.hidden = true
      return
    }
    this.#roles.forEach(({ label }, i) => this.#select.append(h('option', { value: i }, label)))
    const matrix = this.#roles.findIndex(({ stack, role }) => this.rowsOf(stack, role).some((row) => (state.model.shapeOf(row)?.length ?? 0) > 1))
    this.#current = Math.max(matrix, 0)
    this.#select.value = String(this.#current)
    fill(
      root,
      h('div', { class: 'view-tools' }, h('label', { class: 'field' }, 'Role ', this.#select),
        h('span', { class: 'dim' }, 'Each curve is scaled to its own peak. Colour: the statistic.')),
      this.#figure,
    )
    this.draw()
    onWidth(root, () => this.draw())
    state.listen((change) => {
      if (change !== 'tensor') this.draw()
      else this.mark()
    })
  }

  /** Shows the role of a tensor. */
  showRow(row: number): void {
    const { stack, role } = this.state.model.spots[row]
    const at = this.#roles.findIndex((each) => each.stack === this.state.model.stacks[stack] && each.role === role)
    if (at >= 0) this.show(at)
  }

  private show(at: number): void {
    this.#current = at
    this.#select.value = String(at)
    this.draw()
  }

  private rowsOf(stack: Stack, role: number): number[] {
    const found: number[] = []
    for (let layer = 0; layer < stack.layers.length; layer++) {
      for (const row of stack.cells.get(layer * stack.roles.length + role) ?? []) if (this.state.model.a.histogram(row)) found.push(row)
    }
    return found
  }

  private mark(): void {
    for (const ridge of this.#figure.querySelectorAll<SVGGElement>('g.ridge')) {
      ridge.classList.toggle('open', Number(ridge.dataset.row) === this.state.open)
    }
  }

  draw(): void {
    const { state } = this
    const { model } = state
    const { stack, role, label } = this.#roles[this.#current]
    const all = this.rowsOf(stack, role)
    // Of several in a cell (experts) the first stands for its layer, where there is no room for all.
    const first = new Map(all.map((row) => [model.spots[row].layer, row] as const).reverse())
    const rows = (all.length > MOST ? all.filter((row) => first.get(model.spots[row].layer) === row) : all).slice(0, MOST)
    const width = Math.max(this.root.clientWidth, 300)
    const [left, top, right] = [64, 46, 16]
    const step = rows.length > 60 ? 11 : rows.length > 30 ? 16 : 22
    const tall = step * 2.6
    const height = top + step * rows.length + 34
    const ends = rows.map((row) => {
      const found = model.a.histogram(row)!
      return Math.max(Math.abs(found.low), Math.abs(found.high))
    })
    // One layer far from the others would flatten them all: it is cut, and says so.
    const usual = [...ends].sort((a, b) => a - b)[ends.length >> 1] || 1
    const reach = Math.min(Math.max(...ends), 4 * usual) || 1
    const lows = rows.map((row) => Math.max(model.a.histogram(row)!.low, -reach))
    const highs = rows.map((row) => Math.min(model.a.histogram(row)!.high, reach))
    let [low, high] = [Math.min(...lows), Math.max(...highs)]
    if (!(low < high)) [low, high] = [low - 0.5, high + 0.5]
    const x = scaleLinear([low, high], [left, width - right])
    const cut = ends.filter((end) => end > reach).length
    const svg = s('svg', { class: 'chart', width, height, viewBox: `0 0 ${width} ${height}`, role: 'group', 'aria-label': `Distributions of ${label}` })
    rows.forEach((row, i) => {
      const found = model.a.histogram(row)!
      const base = top + step * (i + 1)
      const n = found.counts.length
      const peak = Math.max(...found.counts) || 1
      const bin = (found.high - found.low) / n
      const points: [number, number][] = []
      for (let k = 0; k < n; k++) points.push([found.low + (k + 0.5) * bin, found.counts[k] / peak])
      if (bin === 0) points.splice(0, n, [found.low, 0], [found.low, 1], [found.low, 0])
      const shown = [[found.low, 0] as [number, number], ...points, [found.high, 0] as [number, number]].filter(([v]) => v >= low && v <= high)
      const line = area<[number, number]>().x(([v]) => x(v)).y0(base).y1(([, d]) => base - d * tall).curve(curveBasis)
      const colour = state.colours(state.statistic.value(row)) ?? 'var(--empty)'
      svg.append(
        s('g', {
          class: `ridge${state.hit(row) ? '' : ' dimmed'}${state.open === row ? ' open' : ''}`,
          'data-row': row,
          tabindex: 0,
          role: 'button',
          'aria-label': model.names[row],
          click: () => state.show(row),
          keydown: (event: KeyboardEvent) => {
            if (event.key !== 'Enter') return
            event.preventDefault() // or it would press the button that gets the focus
            state.show(row)
          },
          mousemove: (event: MouseEvent) => tensorTip(state, row, event.clientX, event.clientY),
          mouseleave: hideTip,
        },
        s('path', { d: line(shown) ?? '', fill: colour }),
        s('line', { x1: left, x2: width - right, y1: base, y2: base, class: 'base' }),
        rows.length <= 60 || i % 4 === 0 ? s('text', { x: left - 8, y: base, 'text-anchor': 'end' }, visible(stack.layers[model.spots[row].layer])) : null),
      )
    })
    const axis = s('g', { class: 'axis', transform: `translate(0,${height - 30})` })
    select(axis).call(axisBottom(x).ticks(Math.max(3, width / 120)).tickFormat((value) => tick(value)).tickSize(4))
    svg.append(axis, s('text', { class: 'axis-title', x: width - right, y: height - 2, 'text-anchor': 'end' }, 'value'),
      s('text', { class: 'axis-title', x: left - 8, y: 14, 'text-anchor': 'end' }, 'layer'))
    fill(
      this.#figure,
      svg as unknown as HTMLElement,
      cut ? h('p', { class: 'note' }, `${plural(cut, 'layer')} reach beyond this axis.`) : null,
      all.length > rows.length ? h('p', { class: 'note' }, `${count(rows.length)} of ${plural(all.length, 'tensor')} are drawn: the first of each layer.`) : null,
    )
    this.#figure.dataset.drawn = label
  }
}
