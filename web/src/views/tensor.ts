/** One tensor: its facts, its values as a distribution, its singular values, a picture of it, its siblings. */
import { scaleBand, scaleLinear, scaleLog, scaleSymlog } from 'd3-scale'
import { line } from 'd3-shape'
import { coloursOf } from '../colour'
import { axes, frame } from '../chart'
import { choice, fill, h, s } from '../dom'
import { bytes, count, number, plural, shape, share } from '../format'
import type { Columns, Histogram } from '../model'
import { type Picture, unpack } from '../payload'
import { quoteName } from '../selector/globs'
import type { State } from '../state'
import { hideTip } from '../tip'
import { tensorCurves } from './curves'

const WIDTH = 560

export class TensorSheet {
  #log = false
  #came: Element | null = null

  constructor(
    readonly state: State,
    readonly root: HTMLElement,
    readonly showRole: (row: number) => void,
  ) {
    state.listen((change) => {
      // Whoever moves the slider keeps the focus there.
      if (change === 'tensor' || (change !== 'selection' && state.open !== null)) this.draw(change !== 'step')
    })
    document.addEventListener('keydown', (event) => {
      if (state.open === null || event.defaultPrevented || (event.target as Element).matches?.('input, select, textarea')) return
      if (event.key === 'Escape') state.show(null)
      else if (this.root.contains(event.target as Node) && (event.key === 'ArrowRight' || event.key === 'ArrowLeft')) {
        this.step(event.key === 'ArrowRight' ? 1 : -1)
        event.preventDefault()
      }
    })
  }

  private step(by: number): void {
    const { open, model } = this.state
    if (open === null) return
    const siblings = model.siblings(open)
    const next = siblings[siblings.indexOf(open) + by]
    if (next !== undefined) this.state.show(next)
  }

  private draw(focus = true): void {
    const { state, root } = this
    const row = state.open
    hideTip()
    if (row === null) {
      const inside = root.contains(document.activeElement)
      root.hidden = true
      document.body.classList.remove('with-sheet')
      fill(root)
      if (inside && this.#came instanceof HTMLElement) this.#came.focus()
      return
    }
    if (root.hidden) this.#came = document.activeElement
    root.hidden = false
    document.body.classList.add('with-sheet')
    const { model } = state
    const scrolled = root.scrollTop
    const held = focus || root.contains(document.activeElement)
    fill(
      root,
      this.header(row),
      ...(model.flagged.get(row) ?? []).map(([finding, reason, step]) =>
        h('p', { class: `callout ${finding.severity}` }, h('b', {}, finding.title), ' ',
          step === undefined || !model.over ? null : h('button', { type: 'button', class: 'more', click: () => state.go(model.over!.placeOf(step)) }, `step ${count(step)}`),
          reason ? ` ${reason}` : ` ${finding.what ?? ''}`)),
      model.unread(row) ? h('p', { class: 'callout note' }, h('b', {}, 'Not read.'), ` ${model.unread(row)}`) : null,
      this.facts(row),
      state.model.over ? tensorCurves(state, row) : null,
      this.histogram(row),
      this.quantiles(row),
      this.octaves(row),
      this.singular(row),
      this.picture(row),
      this.siblings(row),
    )
    root.scrollTop = scrolled
    if (held && !root.contains(document.activeElement)) root.querySelector<HTMLElement>('.close')!.focus({ preventScroll: true })
  }

  private header(row: number): HTMLElement {
    const { state } = this
    const name = state.model.names[row]
    const parts = name.split('.')
    return h(
      'header',
      {},
      h('div', { class: 'sheet-tools' },
        h('button', { type: 'button', title: 'Previous layer (←)', 'aria-label': 'Previous layer', click: () => this.step(-1) }, '←'),
        h('button', { type: 'button', title: 'Next layer (→)', 'aria-label': 'Next layer', click: () => this.step(1) }, '→'),
        h('button', { type: 'button', title: 'Select it alone', click: () => state.select(quoteName(name)) }, 'Select'),
        state.model.over ? null : h('button', { type: 'button', title: 'Its role over the layers', click: () => this.showRole(row) }, 'Role'),
        h('button', { type: 'button', class: 'close', 'aria-label': 'Close', title: 'Close (Esc)', click: () => state.show(null) }, '×')),
      h('h2', {}, h('span', { class: 'path' }, parts.length > 1 ? `${parts.slice(0, -1).join('.')}.` : ''), parts.at(-1) || '""'),
    )
  }

  private facts(row: number): HTMLElement {
    const { model, statistic } = this.state
    const { a, b, difference } = model
    const found: [string, string, string?][] = []
    found.push(['shape', shape(model.shapeOf(row))], ['dtype', model.dtypeOf(row)])
    if (model.encodingOf(row)) found.push(['encoding', model.encodingOf(row)!])
    found.push(['elements', count(model.numel[row])], ['stored', bytes(model.nbytes[row])])
    if (model.grad.at(row) !== null) found.push(['requires_grad', String(model.grad.at(row))])
    if (model.kind.at(row) !== 'tensor') found.push(['kind', model.kind.at(row)])
    if (model.module.at(row)) found.push(['module', model.module.at(row)!])
    if (model.layout.at(row)) found.push(['layout', model.layout.at(row)!])
    const aliases = model.payload.table.aliases[String(row)]
    if (aliases) found.push(['also', aliases.join(', ')])
    const raw = model.payload.table.raw[String(row)]
    if (raw) found.push(['stored as', raw])
    if (model.file.words.length > 1 && model.file.at(row)) found.push(['file', model.file.at(row)!])
    const numbers: [string, string, string?][] = []
    if (a.read(row)) {
      const approximate = a.get('exact')[row] ? '' : '≈ '
      const pick = (label: string, format: (columns: Columns) => string) =>
        numbers.push([label, format(a), b?.read(row) ? format(b) : undefined])
      for (const key of ['mean', 'std', 'min', 'max']) pick(key, (columns) => number(columns.get(key)[row]))
      for (const q of [0.01, 0.25, 0.75, 0.99]) pick(`${100 * q} % quantile`, (columns) => approximate + number(columns.quantile(row, q)))
      pick('median', (columns) => approximate + number(columns.quantile(row, 0.5)))
      pick('excess kurtosis', (columns) => approximate + number(columns.get('kurtosis')[row]))
      pick('L1 norm', (columns) => number(columns.get('l1')[row]))
      pick('L2 norm', (columns) => number(columns.get('l2')[row]))
      pick('zeros', (columns) => `${count(columns.get('zeros')[row])} (${share(columns.get('zeros')[row] / columns.get('values')[row])})`)
      pick('NaN · +∞ · −∞', (columns) => ['nan', 'posinf', 'neginf'].map((key) => count(columns.get(key)[row])).join(' · '))
      pick('distinct values', (columns) => `${approximate ? '≥ ' : ''}${count(columns.get('distinct')[row])}`)
      pick('entropy', (columns) => `${approximate ? '≥ ' : ''}${number(columns.get('entropy')[row])} bit`)
      if (a.get('saturated')[row]) pick('saturated', (columns) => count(columns.get('saturated')[row]))
      if (a.has('gradient')) numbers.push(['gradient norm', number(a.get('gradient')[row]), undefined])
    }
    if (model.over) {
      numbers.push(['step', count(model.over.step)])
      for (const each of this.state.statistics) if (each.group === 'steps') numbers.push([each.label, each.format(each.value(row))])
    }
    const compared: [string, string][] = []
    if (difference && model.status) {
      compared.push(['status', model.status.at(row).replace('_', ' ')])
      for (const key of ['relative', 'share', 'angle', 'sqnr', 'maxdiff']) {
        const each = this.state.statistics.find((one) => one.key === key)!
        compared.push([each.label, each.format(each.value(row))])
      }
      const form = model.payload.difference as unknown as { dtype: { words: unknown[]; of: never }; encoding: { words: unknown[]; of: never } }
      const typeB = form.encoding.words[unpack(form.encoding.of)[row]] ?? form.dtype.words[unpack(form.dtype.of)[row]]
      if (typeB && typeB !== model.typeOf(row)) compared.push(['type in B', String(typeB)])
    }
    const list = (pairs: [string, string, string?][], two = false) =>
      h('dl', { class: `facts grid${two ? ' two' : ''}` },
        ...(two ? [h('dt', { class: 'dim' }, ''), h('dd', { class: 'dim' }, 'A'), h('dd', { class: 'dim' }, 'B')] : []),
        ...pairs.flatMap(([label, first, second]) => [
          h('dt', { class: label === statistic.label ? 'chosen' : '' }, label),
          h('dd', {}, first),
          ...(two ? [h('dd', {}, second ?? '–')] : []),
        ]))
    return h('div', {}, list(found), compared.length ? list(compared) : null, numbers.length ? list(numbers, b !== null) : null)
  }

  private block(title: string, caption: string, ...content: (Node | null)[]): HTMLElement {
    return h('section', { class: 'chart-block', 'data-chart': title }, h('h3', {}, title), caption ? h('p', { class: 'caption' }, caption) : null, ...content)
  }

  private histogram(row: number): HTMLElement | null {
    const { a, b } = this.state.model
    const found = a.histogram(row)
    if (!found) return null
    const second = b?.histogram(row) ?? null
    const [low, high] = [Math.min(found.low, second?.low ?? Infinity), Math.max(found.high, second?.high ?? -Infinity)]
    const { clipped, reach } = a.form.histogram
    const chart = frame(WIDTH, 220, 'Histogram')
    const x = scaleLinear(low < high ? [low, high] : [low - 0.5, high + 0.5], [0, chart.width])
    const shares = (each: Histogram, columns: Columns) => {
      const total = columns.get('values')[row] || 1
      return Array.from(each.counts, (n) => n / total)
    }
    const mine = shares(found, a)
    const yours = second && b ? shares(second, b) : []
    const most = Math.max(...mine, ...yours) || 1
    const least = Math.min(...[...mine, ...yours].filter((v) => v > 0)) || most / 10
    const y = this.#log ? scaleLog([least / 2, most * 1.2], [chart.height, 0]).clamp(true) : scaleLinear([0, most], [chart.height, 0])
    const bars = (each: Histogram, values: number[], style: string, label: string) => {
      const single = !(each.low < each.high)
      const width = (each.high - each.low) / values.length
      const group = s('g', { class: style })
      values.forEach((value, i) => {
        if (!value) return
        const left = single ? x(each.low) - 8 : x(each.low + i * width)
        const right = single ? x(each.low) + 8 : x(each.low + (i + 1) * width)
        group.append(
          s('rect', { x: left, width: Math.max(right - left - (right - left > 3 ? 0.8 : 0), 0.5), y: y(value), height: Math.max(chart.height - y(value), 0) },
            s('title', {}, `${label}${number(each.low + i * width)} to ${number(each.low + (i + 1) * width)}: ${count(each.counts[i])} values, ${share(value)}`)),
        )
      })
      return group
    }
    chart.plot.append(bars(found, mine, 'bars', second ? 'A: ' : ''))
    if (second) chart.plot.append(bars(second, yours, 'bars second', 'B: '))
    axes(chart, x, y as never, { x: 'value', y: 'share of values' }, {
      y: (value) => share(value).replace(' %', '%'),
      yValues: this.#log ? powers(least / 2, most * 1.2) : undefined,
    })
    const beyond = found.below + found.above
    const notes = clipped
      ? 'The outermost bars hold all values beyond.'
      : beyond
        ? `${count(found.below)} values lie below and ${count(found.above)} above: further than ${reach} standard deviations from the mean.`
        : ''
    return this.block(
      'Histogram',
      notes,
      h('div', { class: 'block-tools' },
        second ? h('span', { class: 'keys' }, h('i', { class: 'key first' }), 'A ', h('i', { class: 'key second' }), 'B') : null,
        choice('Scale of the counts', [['linear', 'linear'], ['log', 'log']], this.#log ? 'log' : 'linear', (value) => {
          this.#log = value === 'log'
          this.draw()
        })),
      chart.svg,
    )
  }

  private quantiles(row: number): HTMLElement | null {
    const { a, b } = this.state.model
    if (!a.read(row)) return null
    const [mean, std, values] = [a.get('mean')[row], a.get('std')[row], a.get('values')[row]]
    // Beyond the ends of so few values there is nothing to compare.
    const points = a.quantiles(row).filter(([q, v]) => Math.min(q, 1 - q) * values >= 0.5 && Number.isFinite(v))
    if (!(std > 0) || points.length < 5) return null
    const others = b?.read(row) ? b.quantiles(row).filter(([q, v]) => Math.min(q, 1 - q) * values >= 0.5 && Number.isFinite(v)) : []
    const chart = frame(WIDTH, 240, 'Quantiles against a normal distribution')
    const zs = points.map(([q]) => probit(q))
    const x = scaleLinear([zs[0], zs.at(-1)!], [0, chart.width])
    const all = [...points, ...others].map(([, v]) => v)
    const normal = (z: number) => mean + std * z
    const y = scaleLinear([Math.min(...all, normal(zs[0])), Math.max(...all, normal(zs.at(-1)!))], [chart.height, 0]).nice()
    const path = line<[number, number]>(([q]) => x(probit(q)), ([, v]) => y(v))
    chart.plot.append(
      s('line', { class: 'reference', x1: x(zs[0]), x2: x(zs.at(-1)!), y1: y(normal(zs[0])), y2: y(normal(zs.at(-1)!)) }),
      s('path', { class: 'curve', d: path(points) ?? '' }),
    )
    if (others.length) chart.plot.append(s('path', { class: 'curve second', d: path(others) ?? '' }))
    for (const [q, v] of points) {
      chart.plot.append(s('circle', { class: 'point', cx: x(probit(q)), cy: y(v), r: 2.6 }, s('title', {}, `${number(100 * q)} % of the values are at most ${number(v)}; of a normal distribution ${number(normal(probit(q)))}`)))
    }
    axes(chart, x, y, { x: 'standard deviations of a normal distribution', y: 'value' })
    return this.block('Quantiles', 'Straight along the dashed line: normal. Steeper at the ends: heavy tails.', chart.svg)
  }

  private octaves(row: number): HTMLElement | null {
    const { a, model } = { a: this.state.model.a, model: this.state.model }
    const found = a.octaves(row)
    if (!found || !found.negative.length) return null
    const n = found.negative.length
    const total = a.get('values')[row] || 1
    const chart = frame(WIDTH, 200, 'Magnitudes by power of two')
    const exponents = Array.from({ length: n }, (_, i) => found.first + i)
    const x = scaleBand(exponents, [0, chart.width]).paddingInner(0.12)
    const shares = exponents.map((_, i) => [found.negative[i] / total, found.positive[i] / total])
    const most = Math.max(...shares.map(([p, q]) => p + q))
    const y = scaleLinear([0, most], [chart.height, 0])
    exponents.forEach((exponent, i) => {
      const [below, above] = shares[i]
      const text = `2^${exponent} to 2^${exponent + 1}: ${count(found.positive[i])} positive, ${count(found.negative[i])} negative, ${share(below + above)}`
      const rest = { x: x(exponent)!, width: x.bandwidth() }
      chart.plot.append(
        s('g', {},
          s('rect', { ...rest, class: 'bar-positive', y: y(above), height: chart.height - y(above) }, s('title', {}, text)),
          s('rect', { ...rest, class: 'bar-negative', y: y(below + above), height: y(above) - y(below + above) }, s('title', {}, text))),
      )
    })
    const every = Math.ceil(n / 12)
    axes(chart, x as never, y, { x: 'magnitude, exponent of two', y: 'share of values' }, {
      xValues: exponents.filter((_, i) => i % every === 0),
      x: (value) => String(value).replace('-', '−'),
      y: (value) => share(value).replace(' %', '%'),
    })
    const limits: Record<string, [number, number]> = { float16: [-24, 16], float8_e4m3fn: [-9, 9], float8_e5m2: [-16, 16] }
    const outside = Object.entries(limits)
      .filter(([name]) => name !== model.dtypeOf(row))
      .map(([name, [low, high]]) => {
        let lost = 0
        for (let i = 0; i < n; i++) if (exponents[i] < low || exponents[i] >= high) lost += found.negative[i] + found.positive[i]
        return `${name} ${lost ? share(lost / total) : 'none'}`
      })
    return this.block('Magnitudes', `Exact counts. Outside the range of ${outside.join(', ')}, unscaled.`,
      h('div', { class: 'block-tools' }, h('span', { class: 'keys' }, h('i', { class: 'key first' }), 'positive ', h('i', { class: 'key negative' }), 'negative')), chart.svg)
  }

  private singular(row: number): HTMLElement | null {
    const found = this.state.model.payload.spectra[String(row)]
    if (!found) return null
    const figure = (label: string, key: 'spectral_norm' | 'nuclear_norm' | 'stable_rank' | 'effective_rank' | 'tail_exponent', format = number): [string, string] => {
      const error = found.errors[key]
      return [label, found[key] === null ? '–' : `${format(found[key])}${error ? ` ± ${number(error)}` : ''}`]
    }
    const facts: [string, string][] = [
      figure('spectral norm σ₁', 'spectral_norm'),
      figure('nuclear norm Σσ', 'nuclear_norm'),
      figure('stable rank', 'stable_rank'),
      figure('effective rank', 'effective_rank'),
      ['rank', found.rank === null ? '–' : count(found.rank)],
      ['condition σ₁/σₙ', found.condition === null ? '–' : `${found.is_bound ? '≥ ' : ''}${number(found.condition)}`],
      figure('tail exponent', 'tail_exponent'),
      ['above the edge', found.spikes === null ? '–' : count(found.spikes)],
    ]
    const list = h('dl', { class: 'facts grid' }, ...facts.flatMap(([label, value]) => [h('dt', {}, label), h('dd', {}, value)]))
    const values = found.values ? Array.from(unpack(found.values)) : []
    const positive = values.filter((value) => value > 0)
    if (!positive.length) return this.block('Singular values', values.length ? 'All are 0.' : 'Estimated: the matrix is large.', list)
    const chart = frame(WIDTH, 230, 'Singular values')
    const x = scaleLinear([1, Math.max(values.length, 2)], [0, chart.width])
    // What lies below a millionth of the greatest is rounding.
    const low = Math.max(positive.at(-1)!, values[0] * 1e-6)
    const y = scaleLog([Math.min(low, values[0] * 0.7), values[0]], [chart.height, 0]).nice().clamp(true)
    const points = positive.map((value, i): [number, number] => [i + 1, value])
    if (found.edge !== null && found.edge > y.domain()[0] && found.edge < y.domain()[1]) {
      chart.plot.append(
        s('line', { class: 'reference', x1: 0, x2: chart.width, y1: y(found.edge), y2: y(found.edge) }),
        s('text', { class: 'axis-title', x: chart.width, y: y(found.edge) - 5, 'text-anchor': 'end' }, 'Marchenko–Pastur edge'),
      )
    }
    chart.plot.append(s('path', { class: 'curve', d: line<[number, number]>(([i]) => x(i), ([, v]) => y(v))(points) ?? '' }))
    points.filter((_, i) => i < 40 || i % Math.ceil(points.length / 160) === 0).forEach(([i, v]) => {
      chart.plot.append(s('circle', { class: 'point', cx: x(i), cy: y(v), r: 2.2 }, s('title', {}, `σ${i} = ${number(v)}`)))
    })
    axes(chart, x, y, { x: 'rank', y: 'singular value' }, { yValues: powers(...(y.domain() as [number, number])) })
    return this.block('Singular values', `${plural(values.length, 'value')}. Above the edge: more than independent entries would have.`, chart.svg, list)
  }

  private picture(row: number): HTMLElement | null {
    const found = this.state.model.payload.pictures[String(row)]
    if (!found) return null
    const which: ['rms' | 'min' | 'max', string][] = [['rms', 'RMS'], ['min', 'min'], ['max', 'max']]
    const canvas = h('canvas', { class: 'picture', role: 'img', 'aria-label': 'Picture of the values' })
    const said = h('p', { class: 'caption' })
    const draw = (key: 'rms' | 'min' | 'max') => paint(canvas, said, found, key)
    draw('rms')
    const tiles = `${found.down} × ${found.across} tiles of ${number(found.rows / found.down)} × ${number(found.columns / found.across)} values; the first dimension down, all others across.`
    return this.block('Picture', tiles, h('div', { class: 'block-tools' }, choice('Statistic of a tile', which, 'rms', draw)), canvas, said)
  }

  private siblings(row: number): HTMLElement | null {
    const { state } = this
    const { model, statistic } = state
    if (statistic.words) return null
    const rows = model.siblings(row)
    const points = rows.map((each, i): [number, number] => [i, statistic.value(each)]).filter(([, v]) => Number.isFinite(v))
    if (points.length < 3) return null
    const chart = frame(WIDTH, 180, `${statistic.label} over the layers`)
    const x = scaleLinear([0, rows.length - 1], [4, chart.width - 4])
    const values = points.map(([, v]) => v)
    const [low, high] = [Math.min(...values), Math.max(...values)]
    const log = statistic.scale === 'log' && low > 0 && high > 3 * low
    const y = (log ? scaleLog() : statistic.scale === 'diverging' && high > 100 * (Math.abs(low) || 1) ? scaleSymlog() : scaleLinear()).domain(low < high ? [low, high] : [low - 1, high + 1]).range([chart.height - 4, 4])
    chart.plot.append(s('path', { class: 'curve faint', d: line<[number, number]>(([i]) => x(i), ([, v]) => y(v))(points) ?? '' }))
    const stack = model.stacks[model.spots[row].stack]
    for (const [i, v] of points) {
      const here = rows[i] === row
      chart.plot.append(
        s('circle', { class: `point sibling${here ? ' here' : ''}${model.flagged.has(rows[i]) ? ' flagged' : ''}`, cx: x(i), cy: y(v), r: here ? 5 : 3, tabindex: -1, click: () => state.show(rows[i]) },
          s('title', {}, `${stack.layers[model.spots[rows[i]].layer]}: ${statistic.format(v)}`)),
      )
    }
    axes(chart, x, y as never, { x: 'layer', y: statistic.label }, {
      x: (value) => (Number.isInteger(value) && rows[value] !== undefined ? stack.layers[model.spots[rows[value]].layer] : ''),
      yValues: log ? powers(low, high) : undefined,
    })
    return this.block('Over the layers', `${statistic.label} of ${stack.roles[model.spots[row].role]}. A click opens the tensor.`, chart.svg)
  }
}

function paint(canvas: HTMLCanvasElement, said: HTMLElement, found: Picture, key: 'rms' | 'min' | 'max'): void {
  const values = unpack(found[key])
  const odd = unpack(found.nonfinite)
  const scale = Math.max(1, Math.floor(520 / Math.max(found.across, found.down)))
  canvas.width = found.across
  canvas.height = found.down
  canvas.style.width = `${Math.min(found.across * scale, 520)}px`
  canvas.style.height = `${Math.max(found.down * Math.min(scale, 520 / found.across), 12)}px`
  const colours = coloursOf({ scale: key === 'rms' ? 'linear' : 'diverging', key } as never, false, values)
  const context = canvas.getContext('2d')!
  let [low, high] = [Infinity, -Infinity]
  values.forEach((value, i) => {
    if (Number.isFinite(value)) {
      low = Math.min(low, value)
      high = Math.max(high, value)
    }
    context.fillStyle = odd[i] ? '#ff2d55' : (colours(value) ?? '#888')
    context.fillRect(i % found.across, Math.floor(i / found.across), 1, 1)
  })
  const bad = Array.from(odd).filter((each) => each > 0).length
  canvas.dataset.drawn = key
  fill(said, `${key} from ${number(low)} to ${number(high)}.${bad ? ` Red: ${plural(bad, 'tile')} with NaN or infinities.` : ''}`)
}

/** Powers of ten within a range, few enough for an axis. */
function powers(low: number, high: number): number[] {
  const found: number[] = []
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)]
  if (last - first < 1) return [low, Math.sqrt(low * high), high]
  const step = Math.ceil((last - first + 1) / 6)
  for (let power = first; power <= last; power += step) found.push(10 ** power)
  return found
}

/** The value below which a share of a normal distribution lies (Acklam's approximation, relative error 1.2e-9). */
export function probit(p: number): number {
  if (p <= 0 || p >= 1) return p <= 0 ? -Infinity : Infinity
  const a = [-39.69683028665376, 220.9460984245205, -275.9285104469687, 138.357751867269, -30.66479806614716, 2.506628277459239]
  const b = [-54.47609879822406, 161.5858368580409, -155.6989798598866, 66.80131188771972, -13.28068155288572]
  const c = [-0.007784894002430293, -0.3223964580411365, -2.400758277161838, -2.549732539343734, 4.374664141464968, 2.938163982698783]
  const d = [0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661907416]
  const horner = (terms: number[], x: number) => terms.reduce((sum, term) => sum * x + term, 0)
  if (p < 0.02425 || p > 1 - 0.02425) {
    const q = Math.sqrt(-2 * Math.log(Math.min(p, 1 - p)))
    const x = horner(c, q) / horner([...d, 1], q)
    return p < 0.5 ? x : -x
  }
  const q = p - 0.5
  const r = q * q
  return (horner(a, r) * q) / horner([...b, 1], r)
}

